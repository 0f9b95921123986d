"""The uint8 images of a batch: gathered on the host when needed, on the device, or on the host in advance."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..data import ImageDataset

MAX_DEVICE_FRACTION = 4  # a data set is stored on the device if it takes at most a quarter of the free memory
CHUNK = 2**26  # bytes on their way there at a time
AHEAD = 2  # batches that are gathered before they are asked for


class ImageFetcher:
    """Gathered when asked. The CPU's choice: the store's pages are memory already, and a thread would take a core from the step."""

    def __init__(self, dataset: ImageDataset, device: torch.device):
        self.dataset, self.device = dataset, device
        self._buffer = torch.empty(0)

    def __call__(self, indices: Tensor) -> Tensor:
        """indices [B] int64 on the CPU -> uint8 [B, H, W, C] on the device, there until the next call."""
        if self.device.type == "cuda":  # copies may be under way when this returns; torch's pool of pinned memory knows
            return to_device(self._gathered(indices), self.device)
        if len(self._buffer) != len(indices):
            self._buffer = self._room(len(indices))
        # the same memory each time: new pages from the system can take longer than the copying
        return self._gathered(indices, self._buffer).to(self.device)

    def prefetch(self, indices: Tensor) -> None:
        """These will be asked for."""

    def ready(self, indices: Tensor) -> bool:
        """Whether asking for these would not wait."""
        return True

    def close(self) -> None:
        pass

    def _room(self, count: int) -> Tensor:
        shape = count, *self.dataset.images.shape[1:]
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _gathered(self, indices: Tensor, room: Tensor | None = None) -> Tensor:
        room = self._room(len(indices)) if room is None else room
        self.dataset.gather(indices.numpy(), out=room.numpy())
        return room


class DeviceImageCache(ImageFetcher):
    """The whole part lies on the device, and is gathered there."""

    def __init__(self, dataset: ImageDataset, device: torch.device):
        super().__init__(dataset, device)
        shape = dataset.images.shape[1:]
        self.store = torch.empty((len(dataset), *shape), dtype=torch.uint8, device=device)
        for some in torch.arange(len(dataset)).split(max(1, CHUNK // dataset.images[0].nbytes)):
            self.store[some[0] : some[-1] + 1] = to_device(self._gathered(some), device)

    def __call__(self, indices: Tensor) -> Tensor:
        return self.store.index_select(0, to_device(indices, self.device))


class ThreadedImageFetcher(ImageFetcher):
    """A thread gathers what is expected into pinned memory; what was not expected is gathered when asked.

    An error of the thread is raised, with its traceback, where the batch is asked for.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device):
        super().__init__(dataset, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._coming: list[tuple[Tensor, Future]] = []

    def prefetch(self, indices: Tensor) -> None:
        if self._find(indices) is None:
            # the room is made here: the thread touches no CUDA. torch keeps pinned memory until copies from it are done
            gathering = self._thread.submit(self._gathered, indices, self._room(len(indices)))
            self._coming = [*self._coming, (indices, gathering)][-AHEAD:]

    def ready(self, indices: Tensor) -> bool:
        found = self._find(indices)
        return found is None or (found.done() and found.exception() is None)

    def __call__(self, indices: Tensor) -> Tensor:
        found = self._find(indices)
        if found is None:
            return super().__call__(indices)
        self._coming = [(i, f) for i, f in self._coming if f is not found]
        return to_device(found.result(), self.device)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _find(self, indices: Tensor) -> Future | None:
        return next((f for i, f in self._coming if torch.equal(i, indices)), None)


def choose_image_fetcher(dataset: ImageDataset, device: torch.device, where: str = "auto") -> ImageFetcher:
    """On CUDA: stored on the device if `on_device` is set, else gathered in advance."""
    if device.type != "cuda":
        return ImageFetcher(dataset, device)
    return (DeviceImageCache if on_device(dataset, device, where) else ThreadedImageFetcher)(dataset, device)


def on_device(dataset: ImageDataset, device: torch.device, where: str = "auto") -> bool:
    """Whether all images are stored on the device. where: training.images_on; auto: if they fit into a part of its free memory."""
    if device.type != "cuda" or where != "auto":
        return device.type == "cuda" and where == "device"
    return fits(dataset, torch.cuda.mem_get_info(device)[0])


def device_bytes(dataset: ImageDataset, device: torch.device, where: str = "auto") -> int:
    """Bytes of the images that are stored on the device."""
    return dataset.images[0].nbytes * len(dataset) if on_device(dataset, device, where) else 0


def fits(dataset: ImageDataset, free: int) -> bool:
    """Whether this many free bytes are enough for all its images."""
    return MAX_DEVICE_FRACTION * len(dataset) * dataset.images[0].nbytes <= free


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From the host, without waiting for what the device has yet to do (a copy from memory that is not pinned would)."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
