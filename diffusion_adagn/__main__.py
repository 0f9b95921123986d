"""python -m diffusion_adagn COMMAND; torchrun --nproc_per_node N -m diffusion_adagn COMMAND"""

from .cli.main import console

console()
