"""The uint8 images of a batch: gathered on the host when needed, on the device, or on the host in advance."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..data import ImageDataset

MAX_DEVICE_FRACTION = 4  # a data set is stored on the device if it takes at most a quarter of the free memory
CHUNK = 2**26  # bytes on their way there at a time
AHEAD = 2  # batches that are gathered before they are requested


class ImageFetcher:
    """Gathers images when they are requested. Used on the CPU: the store's pages are in memory, and a thread would take a core from the step."""

    def __init__(self, dataset: ImageDataset, device: torch.device):
        self.dataset, self.device = dataset, device
        self._buffer = torch.empty(0)

    def __call__(self, indices: Tensor) -> Tensor:
        """indices [B] int64 on the CPU -> uint8 [B, H, W, C] on the device, there until the next call."""
        if self.device.type == "cuda":  # copies may be under way when this returns; torch's pool of pinned memory knows
            return to_device(self._gathered(indices), self.device)
        if len(self._buffer) != len(indices):
            self._buffer = self._buffer_for(len(indices))
        # the same memory each time: new pages from the system can take longer than the copying
        return self._gathered(indices, self._buffer).to(self.device)

    def prefetch(self, indices: Tensor) -> None:
        """Announce indices that will be requested."""

    def ready(self, indices: Tensor) -> bool:
        """Whether a request for these would not wait."""
        return True

    def close(self) -> None:
        pass

    def _buffer_for(self, count: int) -> Tensor:
        shape = count, *self.dataset.images.shape[1:]
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _gathered(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        out = self._buffer_for(len(indices)) if out is None else out
        self.dataset.gather(indices.numpy(), out=out.numpy())
        return out


class DeviceImageCache(ImageFetcher):
    """Stores all images on the device, and gathers there."""

    def __init__(self, dataset: ImageDataset, device: torch.device):
        super().__init__(dataset, device)
        shape = dataset.images.shape[1:]
        self.store = torch.empty((len(dataset), *shape), dtype=torch.uint8, device=device)
        for some in torch.arange(len(dataset)).split(max(1, CHUNK // dataset.images[0].nbytes)):
            self.store[some[0] : some[-1] + 1] = to_device(self._gathered(some), device)

    def __call__(self, indices: Tensor) -> Tensor:
        return self.store.index_select(0, to_device(indices, self.device))


class ThreadedImageFetcher(ImageFetcher):
    """Gathers announced indices in a thread, into pinned memory; others when they are requested.

    An error of the thread is raised, with its traceback, where its batch is requested.
    """

    def __init__(self, dataset: ImageDataset, device: torch.device):
        super().__init__(dataset, device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pixels")
        self._futures: dict[bytes, Future] = {}  # by indices, oldest first

    def prefetch(self, indices: Tensor) -> None:
        key = indices.numpy().tobytes()
        if key not in self._futures:
            # the buffer is allocated here: the thread touches no CUDA. torch keeps pinned memory until copies from it are done
            self._futures[key] = self._thread.submit(self._gathered, indices, self._buffer_for(len(indices)))
            for old in list(self._futures)[:-AHEAD]:
                del self._futures[old]

    def ready(self, indices: Tensor) -> bool:
        future = self._futures.get(indices.numpy().tobytes())
        return future is None or (future.done() and future.exception() is None)

    def __call__(self, indices: Tensor) -> Tensor:
        future = self._futures.pop(indices.numpy().tobytes(), None)
        return super().__call__(indices) if future is None else to_device(future.result(), self.device)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


def choose_image_fetcher(dataset: ImageDataset, device: torch.device, where: str = "auto") -> ImageFetcher:
    """On CUDA: stored on the device if `on_device` is set, else gathered in advance."""
    kind = DeviceImageCache if on_device(dataset, device, where) else ThreadedImageFetcher
    return (kind if device.type == "cuda" else ImageFetcher)(dataset, device)


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
