"""Still images, alone or in a list that stands for a video: opened under limits, upright, RGB, sizes as officially.

Of a list the pictures that are used are chosen like the frames of a video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from keye.config import ProcessorConfig
from keye.config.media import DEFAULTS, MediaOptions
from keye.errors import KeyeError, MediaError
from keye.media import sampling, sizes
from keye.media.container.animations import tiff_pages
from keye.media.decode.image_reader import MAX_LIST_PIXELS, Header, ImageReader, is_confined
from keye.media.decode.picture import MAX_IMAGE_PIXELS, open_picture, orientation, picture_count, upright
from keye.media.decode.wire import WorkerError
from keye.media.notes import Note, emit, warn_image_options
from keye.media.pixels.patches import Pixels, as_frames, as_picture, in_bytes, is_array
from keye.media.source.fetch import MAX_IMAGE_BYTES, Reference, Source, as_source, decode_list, fetch_source, media_kind

#: The EXIF orientations that swap the axes.
SIDEWAYS = (5, 6, 7, 8)
#: What sentences call a video that is given as pictures.
LISTED = "the list of frames"


@dataclass(frozen=True)
class ImagePlan:
    """What one image will cost. Sizes in pixels; `visual_tokens` counts tokens of the decoder. `notes` are sentences
    about what of the file is used."""

    name: str
    source_width: int
    source_height: int
    width: int
    height: int
    visual_tokens: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": list(self.notes)}


def plan_image(
    source: Reference, config: ProcessorConfig, options: MediaOptions = DEFAULTS, *, pixel_limit: int = MAX_IMAGE_PIXELS
) -> ImagePlan:
    """Reads only the header. Raises `MediaError` for a file that is not an image that keye reads, or is too large."""
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    with _open_image(source, pixel_limit) as image:
        header = _header_of(image, pixel_limit)
    width, height = header.width, header.height
    if not options.strict_official and header.orientation in SIDEWAYS:
        width, height = height, width
    sizes.check_sides(height, width, source.name, ratio=options.resized is None)
    first_size = sizes.compute_image_size(height, width, config, options)
    new_height, new_width = sizes.compute_encoded_size(*first_size, config, options)
    warn_image_options(source.name, (new_height, new_width), config, options)
    file_notes = () if options.strict_official else tuple(_note_contents(source, header))
    emit(source.name, file_notes)
    tokens = config.count_tokens((new_height, new_width))
    return ImagePlan(source.name, width, height, new_width, new_height, tokens, tuple(map(str, file_notes)))


def read_image(
    source: Reference, *, pixel_limit: int = MAX_IMAGE_PIXELS, strict_official: bool = False, planned: bool = False
) -> Image.Image:
    """Decodes an image and turns it upright (EXIF; the official code leaves it as stored). Images with transparency, as
    an alpha channel or a transparent colour, become RGBA, all others RGB; how levels of more than 8 bits become 8 is
    described in docs/video.md. `planned` leaves out the notes that `plan_image` gives.

    Raises `MediaError` for a file that is not an image that keye reads, is damaged, or has more than `pixel_limit`
    pixels.
    """
    source = fetch_source(source, max_bytes=MAX_IMAGE_BYTES)
    with _open_image(source, pixel_limit) as image:
        if not planned and not strict_official:
            emit(source.name, _note_contents(source, _header_of(image, pixel_limit)))
        if isinstance(image, ImageReader):
            return in_bytes(image.picture(0, pixel_limit, strict_official=strict_official))
        return in_bytes(upright(image, strict_official=strict_official))


def open_image(value: object, *, strict_official: bool = False) -> Image.Image:
    """The picture that a user gave as a file or in memory; `strict_official` leaves it as stored, not upright."""
    if isinstance(value, Image.Image) or is_array(value):
        return as_picture(value, strict_official=strict_official)
    return read_image(as_source(value), strict_official=strict_official)


def open_frames(value: Any) -> Any:
    """The frames of a video that is given as pictures: an array or tensor, a list of pictures (files or in memory), or
    a data URL of several JPEG images. None for a video file."""
    if is_array(value):
        return value
    pictures: Sequence[Any] | None = value if isinstance(value, list | tuple) else decode_list(value)
    if pictures is None:
        return None
    untrusted = [picture for picture in pictures if isinstance(picture, Source) and picture.untrusted]
    if untrusted and len(untrusted) == len(pictures):
        # One confined process for all of them; a picture of its own for each would start as many.
        with ImageReader([fetch_source(picture, max_bytes=MAX_IMAGE_BYTES) for picture in untrusted]) as reader:
            return reader.pictures()
    return [open_image(picture) for picture in pictures]


def resize_first(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size that the official utilities return (PIL bicubic on the RGB image).

    RGBA is put on white where the release says so, else its alpha channel is dropped."""
    if image.mode == "RGBA" and config.release.puts_alpha_on_white:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return resize_exactly(image.convert("RGB"), *sizes.compute_image_size(image.height, image.width, config, options))


def resize_image(image: Image.Image, config: ProcessorConfig, options: MediaOptions = DEFAULTS) -> NDArray[np.uint8]:
    """RGB pixels uint8 [H, W, 3] at the size the model sees: `resize_first`, then the processor's own resize."""
    pixels = resize_first(image, config, options)
    height, width, _ = pixels.shape
    return resize_exactly(Image.fromarray(pixels), *sizes.compute_encoded_size(height, width, config, options))


def resize_exactly(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """Bicubic resize of an RGB image to uint8 [height, width, 3]; untouched when the size is right already."""
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _header_of(image: ImageReader | Image.Image, pixel_limit: int) -> Header:
    if isinstance(image, ImageReader):
        return image.header(0, pixel_limit)
    return Header(*image.size, orientation(image), picture_count(image), image.mode)


@contextmanager
def _open_image(source: Source, pixel_limit: int) -> Iterator[ImageReader | Image.Image]:
    """An image file, in this process or, where it has to be, in a confined one."""
    media_kind(source)  # raises for what is neither an image nor a video
    if is_confined(source):
        with ImageReader([source]) as reader:
            yield reader
        return
    try:
        with source.open() as file, open_picture(file, pixel_limit) as image:
            yield image
    except WorkerError as error:
        if error.__cause__ is not None:
            raise MediaError(f"{source.name} is damaged ({error.__cause__}); download or export it again") from None
        raise MediaError(f"{source.name} {error}") from None


def _note_contents(source: Source, header: Header) -> Iterator[Note]:
    """What a user may not expect: pictures beside the one that is used, and levels without a fixed range."""
    with source.open() as file:
        pages = tiff_pages(file)
    if media_kind(source) == "video":
        yield Note("it moves, and as an image only its first picture is used; give it as a video for all of it")
    elif pages > 1:
        yield Note(f"it has {pages:,} pages, of which only the first is used; save the others as files of their own")
    elif header.pictures > 1:
        yield Note(f"it holds {header.pictures:,} pictures, of which only the main one is used")
    if header.mode in ("I", "F"):
        yield Note("its levels have 32 bits; where they leave the range from 0 to 255 (or 0 to 1), the lowest becomes "
                   "black and the highest white")  # fmt: skip


def select_range(count: int, options: MediaOptions) -> tuple[int, int, int]:
    """First index, last index and number of the listed pictures in the part asked for; officially, and without times,
    all."""
    times = options.timestamps
    if times is not None and len(times) != count:
        raise KeyeError(f"{count} frames have {len(times)} timestamps; give one for each frame")
    if times is None and options.fps is not None:
        times = tuple(i / options.fps for i in range(count))
    if not times or options.strict_official:
        return 0, count - 1, count
    # The last picture is on display as long as the others are on average.
    step = (times[-1] - times[0]) / max(count - 1, 1)
    end = times[-1] + step
    return sampling.find_time_range(times, end, video_start=options.video_start, video_end=options.video_end)


def select_listed(count: int, config: ProcessorConfig, options: MediaOptions) -> tuple[list[int], float]:
    """Preview: which of `count` listed pictures are used, the last repeated to an even number, and their average rate.

    Officially all are; `nframes` and `max_frames` are honoured unless `strict_official`.
    """
    fps = options.fps or config.fps
    first, last, count = select_range(count, options)
    if options.timestamps is not None:
        fps = sampling.compute_average_rate(options.timestamps[first : last + 1]) or fps
    wanted = min(options.nframes or count, options.max_frames or count, count)
    indices = list(range(first, last + 1))
    if wanted < count and not options.strict_official:
        indices = sampling.sample_indices(first, last, wanted)
        fps *= wanted / count
    return indices + indices[-1:] * (-len(indices) % config.frame_factor), fps


def sample_list(
    pictures: Any, config: ProcessorConfig, options: MediaOptions
) -> tuple[Sequence[Pixels], tuple[float, ...] | None]:
    """1.5 and 2.0: the sampled pictures of a list (or an array of frames), as RGB of one size, and their times.

    They are sampled like the frames of a video at `fps`, else the configuration's rate; times are known only with
    `fps` or `timestamps`.
    """
    frames = as_frames(pictures)
    native = options.fps or config.fps
    first, _, count = select_range(len(frames), options)
    indices = sampling.sample_frames(count, native, config, options, first=first)
    if not indices:
        raise sampling.explain_no_frame(LISTED, config, options)
    pixels = resize_to_one_size([frames[i] for i in indices], config, options, listed=True)
    if options.timestamps is not None:
        return pixels, tuple(options.timestamps[i] for i in indices)
    return pixels, None if options.fps is None else tuple(i / native for i in indices)


def resize_to_one_size(
    pictures: Pixels | Sequence[Any], config: ProcessorConfig, options: MediaOptions, *, listed: bool
) -> Sequence[Pixels]:
    """The frames as RGB arrays of one size, that of the first: its own, or if `listed` that of a picture of a list."""
    first = pictures[0]
    height, width = first.shape[:2] if isinstance(first, np.ndarray) else (first.height, first.width)
    size = sizes.compute_listed_frame_size(height, width, config, options) if listed else (height, width)
    if isinstance(pictures, np.ndarray) and size == (height, width):
        return list(pictures)
    return [resize_exactly(open_frame(frame).convert("RGB"), *size) for frame in pictures]


def open_frame(frame: NDArray[np.uint8] | Image.Image) -> Image.Image:
    return Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame


def count_least_list_tokens(pictures: Sequence[Source], config: ProcessorConfig, options: MediaOptions) -> int:
    """Visual tokens that a list of picture files takes at least: exactly that, except for 1.5, whose frames are
    not classified yet. `MediaError` where the pictures have too many pixels together, `KeyeError` for bad options."""
    count = len(pictures)
    if not all(picture.untrusted for picture in pictures):
        plan = plan_image(pictures[0], ProcessorConfig())
        height, width = plan.source_height, plan.source_width
    else:
        with ImageReader([fetch_source(picture, max_bytes=MAX_IMAGE_BYTES) for picture in pictures]) as reader:
            headers = [reader.header(index) for index in range(count)]
        if sum(header.width * header.height for header in headers) > MAX_LIST_PIXELS:
            raise MediaError(
                f"the pictures of {pictures[0].name} have too many pixels together; shrink them or send a video file"
            )
        height, width = headers[0].height, headers[0].width
        if headers[0].orientation in SIDEWAYS:
            height, width = width, height
    if config.release.sizes_lists_as_images:
        indices, _ = select_listed(count, config, options)
        first_size = sizes.compute_image_size(height, width, config, options)
        return len(indices) * config.count_tokens(sizes.compute_encoded_size(*first_size, config, options))
    _, _, count = select_range(count, options)
    if options.timestamps is None:
        height, width = sizes.compute_listed_frame_size(height, width, config, options)
        count = sampling.smart_nframes(count, options.fps or config.fps, config, options)
    if count < 1:
        return 0
    frame_sizes = sizes.compute_frame_sizes(height, width, count, config, options)
    return count * config.count_tokens(frame_sizes.fast)
