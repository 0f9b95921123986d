"""The parser of the commands, and options generated from classes of settings.

Dashes equal underscores; an unknown option is answered with the nearest one.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from ..commands import shell_line
from ..config import DataConfig, RunConfig, with_overrides
from ..errors import InputError, UsageError, did_you_mean
from ..renamed import ALIASES, CONFIG_KEYS, FOREIGN_OPTIONS, OPTIONS
from ..runs.weights import Weights
from ..schema import Layer, Setting, build, fields_of, type_name

T = TypeVar("T")
RUN_HELP = (
    "a run folder (runs/digits), one of its checkpoints (or runs/digits@400, at step 400), a pipeline folder, owner/name on the "
    "hub, or digits or cifar10, models that are shipped with the package; RUN:0.1 is RUN with --ema 0.1"
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError instead of exiting, and suggests the nearest option."""

    def __init__(self, command: str, description: str | None, usage: str | None = None):
        lines = None if usage is None else "\n       ".join(f"adagn {command} {line}" for line in usage.splitlines())
        super().__init__(
            f"adagn {command}", lines, description, allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=118),
        )  # fmt: skip
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self._has_model = False

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """The options, without settings that were not given; and the whole command line as `typed`."""
        args, unknown = self.parse_known_args([self._canonical(word) for word in argv])
        args.typed = shell_line([*self.prog.split(), *argv])
        if self._has_model:
            read_weights(args, "run")
        for action in self._actions:  # argparse accepts an optional positional argument only before the first option
            missing = not action.option_strings and action.nargs == "?" and not getattr(args, action.dest)
            if missing and unknown and not unknown[0].startswith("-"):
                setattr(args, action.dest, unknown.pop(0))
        if unknown:
            hint = self._hint(unknown[0].partition("=")[0]) or f" `{self.prog} --help` lists the options."
            raise UsageError(f"{self.prog} does not know '{unknown[0]}'.{hint}")
        return args

    def _canonical(self, word: str) -> str:
        """The option with underscores instead of dashes, and with its new name instead of an old one."""
        if not word.startswith("--"):
            return word
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        known, new = self._option_string_actions, (CONFIG_KEYS | OPTIONS | ALIASES).get(name)
        renamed = f"--{name}" not in known and f"--{new}" in known
        return f"--{new if renamed else name}{equals}{value}"

    def _hint(self, option: str) -> str:
        known = [o for action in self._actions for o in action.option_strings]
        same = [f"--{o}" for o in FOREIGN_OPTIONS.get(option.lstrip("-"), ()) if f"--{o}" in known][:1]
        same = same or [o for o in known if o.rpartition(".")[2] == option.lstrip("-")]  # without its section
        return f" Did you mean {' or '.join(same)}?" if same else did_you_mean(option, known, most=2)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message}. `{self.prog} --help` lists the options.")

    # ------------------------------------------------------------------ arguments of several commands

    def add_model(self) -> None:
        """The argument RUN."""
        self.add_argument("run", metavar="RUN", help=RUN_HELP)
        self._has_model = True

    def add_config(self) -> None:
        """The config file, as an argument or as --config; `config_file` reads it."""
        help = "a YAML file, or the name of a recipe, such as digits (adagn init lists them)"
        self.add_argument("config_argument", nargs="?", metavar="CONFIG", help=help)
        self.add_argument("--config", metavar="CONFIG", help="the same")
        device = {"dest": "speed.device", "default": argparse.SUPPRESS, "help": "the same as --speed.device"}
        self.add_argument("--device", metavar="DEVICE", **device)
        self.add_options(RunConfig, flags=False)

    def add_config_sections(self, *sections: str) -> None:
        """The options of some sections of a run's config."""
        others = {s.key.partition(".")[0] for s in fields_of(RunConfig)} - set(sections)
        self.add_options(RunConfig, skip=sorted(others), flags=False)

    def add_labelled_data(self) -> None:
        """--against and the data settings; `labelled_data` reads them."""
        help = "labelled images that the model was not trained on [held-out ones of the run's own data]"
        self.add_argument("--against", metavar="NAME_OR_PATH[:split]", help=help)

    def add_out(self, help: str, metavar: str = "DIR") -> None:
        """--out, None by default."""
        self.add_argument("--out", metavar=metavar, help=help)

    def add_options(
        self,
        cls: type,
        skip: Sequence[str] = (),
        several: bool = False,
        flags: bool = True,
        defaults: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        """An option for every setting of a class; `request` reads them. Values remain text until then.

        Args:
            cls: The class of settings. Options of a RunConfig are called by the dotted key.
            skip: Settings and sections without an option.
            several: Each option takes several values, separated by commas.
            defaults: The defaults that help shows in place of the class's, by key.
            flags: Options that are true or false take no value; otherwise the value may be omitted.
        """
        groups: dict[str, Any] = {"": self}
        for setting, option in _options(cls, skip):
            section = setting.key.rpartition(".")[0]
            if section not in groups:
                title = f"{section}.*" if cls is RunConfig else section.rpartition(".")[2]
                groups[section] = self.add_argument_group(title, setting.section.__doc__.partition("\n")[0])
            metavar = setting.option.metavar or type_name(setting.hint)
            flag: dict[str, Any] = {"metavar": metavar + ",..." * (several and "," not in metavar)}
            if setting.hint is bool:
                flag = {"action": "store_const"} if flags else {"nargs": "?", "metavar": metavar}
                flag["const"] = "true"
            elif setting.hint == tuple[str, ...] and "," not in metavar:  # with commas, one text has all values
                flag["action"] = "append"
            flag |= {
                "dest": setting.key,
                "default": argparse.SUPPRESS,
                "help": _help(setting, defaults.get(setting.key)),
            }
            groups[section].add_argument(f"--{option}", **flag)


def read_weights(args: argparse.Namespace, name: str) -> None:
    """Replace RUN@STEP:EMA in the argument `name` by the path of its checkpoint, and set --ema. Raises InputError for a wrong one."""
    text = getattr(args, name)
    weights = Weights.parse(text)
    setattr(args, name, weights.path)
    if weights.ema is not None:
        if getattr(args, "ema", "run") not in ("run", str(weights.ema)):
            raise UsageError(f"{text} and --ema {args.ema} name two EMA lengths: give one.")
        args.ema = weights.ema


def _options(cls: type, skip: Sequence[str] = ()) -> Iterator[tuple[Setting, str]]:
    """Each setting with the name of its option."""
    for setting in fields_of(cls):
        section, _, last = setting.key.rpartition(".")
        name = (setting.key if cls is RunConfig else last) if setting.option.name is None else setting.option.name
        if name and not {setting.key, section.partition(".")[0]} & set(skip):
            yield setting, name


def option_names(cls: type) -> dict[str, str]:
    """What messages call each setting of a class."""
    return {setting.key: f"--{option}" for setting, option in _options(cls)}


def _help(setting: Setting, default: object = None) -> str:
    """The description of a setting, and its default."""
    default = setting.option.default if default is None else default
    if default is None and not setting.info.is_required():
        default = setting.info.get_default(call_default_factory=True)
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        default = f"{default:g}" if isinstance(default, float) else default
        default = str(default).lower() if isinstance(default, bool) else default
    shown = "" if default in (None, "", "false") else f" [{default}]"
    return f"{' '.join((setting.info.description or '').split())}{shown}".replace("%", "%%")


def request(
    args: argparse.Namespace,
    cls: type[T],
    given: Mapping[str, Any] | None = None,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """The settings that a command line describes.

    Args:
        args: Parsed options.
        cls: The class of settings.
        given: Other values by key.
        labels: What messages call a setting that is not given by its option.

    Raises:
        UsageError: A value is invalid.
    """
    values = {s.key: getattr(args, s.key) for s in fields_of(cls) if hasattr(args, s.key)}
    try:
        return build(cls, Layer(values | dict(given or {}), labels=option_names(cls) | dict(labels)))
    except InputError as error:
        raise UsageError(str(error)) from None


def config_file(args: argparse.Namespace) -> str | None:
    """The config given as argument or as --config. Raises UsageError for two different ones."""
    argument, option = args.config_argument, args.config
    if None not in (argument, option) and argument != option:
        raise UsageError(f"two configs were given, {argument} and --config {option}: give one.")
    return option if argument is None else argument


def labelled_data(args: argparse.Namespace) -> DataConfig | None:
    """The data that --against and --data.* name; None without both, which is the run's own."""
    from ..runs.recorded import recorded_data

    overrides, source = config_overrides(args), args.against
    if source is not None:  # none of the run's own data settings apply
        return with_overrides(RunConfig(), overrides | {"data.source": source}).data
    return (
        with_overrides(RunConfig(data=recorded_data(args.run) or DataConfig()), overrides).data if overrides else None
    )


def config_overrides(args: argparse.Namespace) -> dict[str, str]:
    """The options of RunConfig that were given, by dotted key."""
    return {s.key: getattr(args, s.key) for s in fields_of(RunConfig) if hasattr(args, s.key)}
