"""Pictures of digits, brought to the form of MNIST's: `normalise` is what a network has to see.

    pip install pillow scipy    # or, in this project, sh setup.sh extras

    image = normalise('photo.jpg')    # float32 [784], as input_data yields them

Needs NumPy, Pillow and SciPy, and no TensorFlow: copy this one file to read pictures with a network
of your own.
"""

import contextlib
import ctypes
import io
import math
import os
import re

import numpy as np

try:
    from PIL import Image, ImageOps, ImageStat
    from scipy import ndimage
except ImportError as error:
    raise ImportError(f'{error}\nTo install the packages that read pictures, run: '
                      'sh setup.sh extras') from None

VIEW = 224  # pixels: a picture is looked at in this size, or smaller
NOTHING = 'no digit: nothing on it stands out as ink on paper does'
TOUCHING = np.ones([3, 3])  # a pixel and its eight neighbours


class SeveralDigits(ValueError):
    """Several digits stand side by side, or it looks so: an open 4's stem may be far from the rest.

    Attributes:
        image: float32 array [784], what `normalise` would return if all of it were one digit.
    """

    def __init__(self, count, image):
        super().__init__(f'{count} digits side by side, expected one: crop the picture to one '
                         'digit')
        self.image = image


def normalise(picture):
    """Makes a picture of one digit look like MNIST's.

    The network has never seen a picture that was merely resized. MNIST's recipe, from its home page
    (Y. LeCun, C. Cortes, C. J. C. Burges, http://yann.lecun.com/exdb/mnist/): the black and white
    digits of NIST's Special Databases 1 and 3 were scaled to fit into 20x20 pixels, width and
    height alike, which gave them grey levels, and placed in 28x28 pixels with their centre of mass
    in the middle.

    Args:
        picture: a path; or a Pillow image; or a uint8 array [height, width] or [height, width, 1
            (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA)]. Ink may be dark on light or light on
            dark, and the digit anywhere.

    Returns:
        float32 array [784], values in [0, 1]: the digit as `mnist_deep.deepnn` takes it.

    Raises:
        OSError: the file cannot be read.
        SeveralDigits: a ValueError; more than one digit is found.
        ValueError: no digit is found; or it is no picture, or too large.
    """
    picture = as_picture(picture)
    try:
        return normalise_grey(to_grey(picture))
    except SeveralDigits:
        raise
    except ValueError:  # ink and paper may be of one brightness, and of different colours
        channel = strongest_channel(picture)
        if channel is None:
            raise
        return normalise_grey(channel)


def normalise_grey(grey):
    """Does for a Pillow image of grey levels what `normalise` does."""
    whole = 0, 0, *grey.size
    try:
        box, _, _ = find_digit(grey, whole)
    except ValueError:  # light and shadow may hide a small digit from a wide window
        box, _, _ = find_digit(grey, whole, 1 / 8)
    box, ink, digits = find_digit(grey, box)  # from near
    if is_frame(ink > 0):
        try:
            return normalise_grey(grey.crop(grown(box, -0.12, grey.size)))
        except SeveralDigits:
            raise
        except ValueError:
            pass  # there is nothing inside: it is a 1 or a 0, as straight as a frame
    image = in_28x28(with_mnists_stroke(ink)).reshape(784)
    if digits > 1:
        raise SeveralDigits(digits, image)
    return image


def as_picture(picture):
    """Turns what `normalise` takes into a Pillow image."""
    if isinstance(picture, (str, os.PathLike)):
        return open_picture(picture)
    if isinstance(picture, Image.Image):
        return picture
    picture = np.asarray(picture)
    shape = picture.shape
    if picture.dtype != np.uint8 or not picture.size or not (
            len(shape) == 2 or len(shape) == 3 and shape[2] <= 4):
        raise ValueError(f'picture is {picture.dtype} {list(shape)}, expected uint8 [height, '
                         'width] or [height, width, 1 to 4 channels]')
    return Image.fromarray(picture[..., 0] if shape[2:] == (1,) else picture)


def to_grey(picture):
    """Turns a Pillow image into one of grey levels."""
    if picture.mode[0] in 'IF':  # integers or floats of any range
        levels = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
        levels = (levels - levels.min()) / max(np.ptp(levels) / 255, 1e-9)
        picture = Image.fromarray(levels.astype(np.uint8))
    if 'A' not in picture.getbands() and 'transparency' not in picture.info:
        return picture.convert('L')
    picture = picture.convert('RGBA')
    grey, opacity = picture.convert('L'), picture.getchannel('A')
    counts = grey.histogram(opacity)  # of the levels that can be seen
    paper = 0 if sum(counts[128:]) > sum(counts[:128]) else 255  # what the ink is not
    return Image.composite(grey, Image.new('L', grey.size, paper), opacity)


def strongest_channel(picture):
    """The channel that varies most; None without colours, or where transparency tells the ink."""
    if picture.mode not in ('RGB', 'P') or 'transparency' in picture.info:
        return None
    channels = picture.convert('RGB').split()
    return max(channels, key=lambda channel: ImageStat.Stat(channel).stddev[0])


def find_digit(grey, box, window=1 / 2):
    """Finds the digit in a part of a picture.

    Args:
        grey: Pillow image of grey levels.
        box: (left, top, right, bottom), in pixels. The paper around it is looked at, too, but what
            lies wholly outside of the box is not the digit.
        window: see `find_ink`.

    Returns:
        (left, top, right, bottom): where it is, in pixels.
        ink: float32 array [height, width], that part in at most VIEW pixels: 0 is paper, 1 ink.
        digits: how many digits seem to stand there side by side.
    """
    left, top, right, bottom = part = grown(box, 0.35, grey.size)
    scale = max(1, max(right - left, bottom - top) / VIEW)
    width, height = math.ceil((right - left) / scale), math.ceil((bottom - top) / scale)
    view = grey.resize((width, height), Image.BOX, box=part)
    view = dark_on_light(np.asarray(view, np.float32))
    ink, is_ink, contrast = find_ink(view, window)
    x, y = (right - left) / width, (bottom - top) / height
    inside = (slice(int((box[1] - top) / y), math.ceil((box[3] - top) / y)),
              slice(int((box[0] - left) / x), math.ceil((box[2] - left) / x)))
    is_digit, digits = digit_pieces(is_ink, inside)

    # Paper is on both sides of a stroke. What passes for ink at the edge of a shadow, or in noise,
    # is as dark as something beside it.
    near = ndimage.binary_dilation(is_digit, TOUCHING)
    beside = ndimage.binary_dilation(near, TOUCHING, 2) & ~near
    lighter = view[beside] > np.median(view[is_digit]) + contrast / 2
    if lighter.sum() < 0.85 * lighter.size:
        raise ValueError(NOTHING)

    rows, columns = box_of(is_digit)
    ink = np.pad(ink * near, 1)  # a stroke's grey edge belongs to it, too
    ink = ink[rows.start:rows.stop + 2, columns.start:columns.stop + 2]
    box = (left + columns.start * x, top + rows.start * y,
           left + columns.stop * x, top + rows.stop * y)
    return box, ink / ink.max(), digits


def grown(box, margin, size):
    """A box with a margin, a share of its longer side, but within a picture of [width, height]."""
    left, top, right, bottom = box
    margin *= max(right - left, bottom - top)
    return (max(0, int(left - margin)), max(0, int(top - margin)),
            min(size[0], math.ceil(right + margin)), min(size[1], math.ceil(bottom + margin)))


def dark_on_light(view):
    """Inverts grey levels, float32 [height, width], 0 to 255, if the ink is light."""
    # There is less ink than paper, and outside of the picture there is more paper: so ink differs
    # most from what is around it. Light and shadow differ as much to one side as to the other.
    wide = np.pad(view, max(view.shape) // 4, mode='edge')
    differs = wide - ndimage.uniform_filter(wide, max(wide.shape) // 4 | 1, mode='nearest')
    differs -= np.median(differs)
    return 255 - view if (differs * np.abs(differs)).sum() > 0 else view


def find_ink(view, window):
    """Takes paper and light away from grey levels.

    Args:
        view: float32 array [height, width], 0 to 255, with dark ink.
        window: what is dark and narrower is ink, as a share of the view's longer side.

    Returns:
        ink: float32 array [height, width], 0 is paper, 1 ink.
        is_ink: bool array [height, width].
        contrast: how much darker ink is than paper, in grey levels.
    """
    window = int(window * max(view.shape)) | 1
    ink = ndimage.grey_closing(view, [window, window], mode='nearest') - view  # closed, it is paper
    if np.ptp(ink) < 1:
        raise ValueError(NOTHING)
    threshold = otsu_threshold(ink)
    is_ink = ink >= threshold
    contrast = ink[is_ink].mean() - ink[~is_ink].mean()
    paper = np.median(ink[~is_ink])
    unrest = 1.48 * np.median(np.abs(ink[~is_ink] - paper))  # the paper's standard deviation
    if contrast < max(3, 5 * unrest):
        raise ValueError(NOTHING)
    fainter = ink > 0.75 * threshold + 0.25 * paper  # there, a stroke goes on
    is_ink = ndimage.binary_propagation(is_ink, TOUCHING, mask=fainter)
    return np.clip((ink - paper) / (np.median(ink[is_ink]) - paper), 0, 1), is_ink, contrast


def otsu_threshold(ink):
    """The grey level that parts ink and paper into the two most separate groups.

    N. Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    counts = np.bincount((ink - ink.min()).astype(int).ravel())
    below, sums = np.cumsum(counts), np.cumsum(counts * np.arange(counts.size))
    between = (sums[-1] / below[-1] * below - sums)[:-1] ** 2 / (below * (below[-1] - below))[:-1]
    return ink.min() + 1 + between.argmax()


def digit_pieces(is_ink, inside):
    """Drops what is not the digit.

    Args:
        is_ink: bool array [height, width].
        inside: rows and columns, two slices; what lies wholly outside of them is dropped, too.

    Returns:
        is_digit: bool array [height, width].
        digits: how many digits seem to stand there side by side.
    """
    is_ink = without_edges(is_ink, inside)
    groups = near_pieces(is_ink)
    is_digit = without_frames(without_specks(is_ink, groups))
    return is_digit, count_digits(is_digit, groups)


def pieces_of(is_ink):
    """The pieces of ink in a bool array [height, width].

    Returns:
        numbers: int array [height, width], 0 is paper, 1 the first piece.
        boxes: int array [n, 2, 2], where the rows and columns of each begin and end.
        sizes: int array [n, 2], their heights and widths.
    """
    numbers, _ = ndimage.label(is_ink, TOUCHING)
    boxes = np.array([[(side.start, side.stop) for side in box]
                      for box in ndimage.find_objects(numbers)])
    return numbers, boxes, boxes[..., 1] - boxes[..., 0]


def without_edges(is_ink, inside):
    """Drops what runs along the border, the sheet's edge or a shadow, and what is not inside."""
    numbers, _, sizes = pieces_of(is_ink)
    areas = np.bincount(numbers.ravel())[1:]
    border = np.concatenate([numbers[0], numbers[-1], numbers[:, 0], numbers[:, -1]])
    is_edge = np.bincount(border, minlength=len(areas) + 1)[1:] > 0.5 * sizes.max(1)
    is_edge |= ~np.isin(range(1, len(areas) + 1), numbers[inside])
    if is_edge.all():
        is_edge = areas > 0.4 * sizes.prod(1)  # a digit that is cut off does not fill its box
    if is_edge.all():
        raise ValueError(NOTHING)
    return is_ink & np.append(False, ~is_edge)[numbers]


def near_pieces(is_ink):
    """Numbers [height, width] of what belongs together: it is nearer than the pen is wide."""
    near = ndimage.distance_transform_edt(~is_ink) <= (pen_width(is_ink) + 1) / 2
    return ndimage.label(near, TOUCHING)[0] * is_ink


def without_specks(is_ink, groups):
    """Drops what is much smaller, unless the digit is around it: then a stroke is broken."""
    areas = np.bincount(groups.ravel())[1:]
    large = np.append(False, areas > 0.05 * areas.max())[groups]
    among = np.zeros_like(is_ink)
    among[box_of(large)] = True
    return ndimage.binary_propagation(is_ink & (large | among), TOUCHING, mask=is_ink)


def without_frames(is_ink):
    """Drops what surrounds a piece that is not much smaller: a frame, or a cell of a form."""
    numbers, boxes, sizes = pieces_of(is_ink)
    heights = sizes[:, 0]
    frames = [((box[:, 0] < boxes[..., 0]) & (box[:, 1] > boxes[..., 1])).all(1)
              & (heights > 0.4 * height) for box, height in zip(boxes, heights)]
    return is_ink & np.append(False, ~np.any(frames, 1))[numbers]


def count_digits(is_digit, groups):
    """How many digits stand there side by side, in pieces that are of these groups."""
    # Digits share no column, and none is much taller than another.
    _, boxes, sizes = pieces_of(is_digit)
    heights = sizes[:, 0]
    digits = end = 0
    for start, stop in sorted(boxes[heights >= 0.5 * heights.max(), 1].tolist()):
        digits += start >= end
        end = max(end, stop)

    # The strokes of one digit may do so, too, if they are near and together no wider than high.
    rows, columns = box_of(is_digit)
    if columns.stop - columns.start <= rows.stop - rows.start:
        digits = min(digits, np.unique(groups[is_digit]).size)
    return digits


def pen_width(is_ink):
    """How wide the strokes of a bool array [height, width] are, in pixels."""
    # On average over a stroke, its edge is 0.5 pixels and a quarter of its width away.
    return 4 * ndimage.distance_transform_edt(is_ink)[is_ink].mean() - 2


def is_frame(is_digit):
    """Whether it reaches along all four sides of its box, as a frame, a window or a sheet does."""
    rows, columns = (math.ceil(0.12 * side) for side in is_digit.shape)
    return min(is_digit[:rows].any(0).mean(), is_digit[-rows:].any(0).mean(),
               is_digit[:, :columns].any(1).mean(), is_digit[:, -columns:].any(1).mean()) > 0.8


def with_mnists_stroke(ink):
    """Makes strokes that are thinner than MNIST's as thick as MNIST's thinnest."""
    scale = math.ceil(80 / max(ink.shape))  # in few pixels there is little to measure
    if scale > 1:
        ink = Image.fromarray(np.pad(ink, 2))
        ink = np.clip(ink.resize((ink.width * scale, ink.height * scale), Image.BICUBIC), 0, 1)
    size = max(ink.shape)
    ink = np.pad(ink, size // 10)

    # A thin line may lie on two rows of pixels, half on each: 0.35 is ink, too.
    is_ink = ink > 0.35
    width = pen_width(is_ink) / size
    if width > 0.375:
        raise ValueError('no digit: what stands out on it is a blot, not the strokes of a pen')
    if width < 0.07:  # one in a hundred of MNIST's digits
        grow = (0.07 - width) / 2 * size  # on each side
        ink = np.maximum(ink, np.clip(1 + grow - ndimage.distance_transform_edt(~is_ink), 0, 1))
    return ink


def in_28x28(ink):
    """Scales ink to fit into 20x20, and places its centre of mass in the middle of 28x28.

    That is the pixel (14, 14), counted from 0: in MNIST's own images, the centre of mass is at most
    half a pixel from it.
    """
    ink = ink[box_of(ink > 0.3)].astype(np.float32)
    size = max(ink.shape)
    ink = np.pad(ink, size)
    top, left = np.add(ndimage.center_of_mass(ink), 0.5) - 14.5 / 20 * size
    side = 28 / 20 * size
    image = np.asarray(Image.fromarray(ink).resize((28, 28), Image.BILINEAR,
                                                   box=(left, top, left + side, top + side)))
    return image / image.max()


def box_of(mask):
    """The rows and the columns, two slices, of all True pixels."""
    return ndimage.find_objects(mask.astype(np.uint8))[0]


# Files.

MAX_BYTES = 100_000_000  # a larger file is not read
MAX_PIXELS, MAX_SIDE = 50_000_000, 65_535  # nor is a picture that promises more unpacked
MAX_SCANS = 100  # nor a JPEG that comes in more parts: cameras and programs write at most 20
KINDS = ('PNG', 'JPEG', 'GIF', 'BMP', 'WEBP', 'TIFF')  # of the many that Pillow knows

with contextlib.suppress(AttributeError, OSError):  # it may have no libtiff, or hide it
    # Of a damaged TIFF, libtiff prints lines on standard error; Pillow raises an exception anyway.
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


def open_picture(file):
    """Opens a picture, the first one of an animation, and turns it as its camera was held.

    Args:
        file: a path, or a binary file that is open for reading.

    Returns:
        A Pillow image. A large JPEG is unpacked in a half, a quarter or an eighth of its size.

    Raises:
        OSError: the file cannot be read.
        ValueError: what it holds is no picture, is damaged, or is too large.
    """
    if isinstance(file, (str, os.PathLike)):
        if os.path.exists(file) and not os.path.isfile(file):  # a pipe or a device may never end
            raise ValueError('a folder, a pipe or a device, expected a picture file')
        with open(file, 'rb') as f:
            return open_picture(f)
    body = file.read(MAX_BYTES + 1)
    if not 0 < len(body) <= MAX_BYTES:
        raise ValueError(f'{len(body):,} bytes, expected 1 to {MAX_BYTES:,}')
    try:
        picture = Image.open(io.BytesIO(body), formats=KINDS)
        if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE:
            raise ValueError(f'it has {picture.width:,} x {picture.height:,} pixels, expected at '
                             f'most {MAX_PIXELS:,}, and {MAX_SIDE:,} on a side')
        if picture.format == 'JPEG' and has_more_scans(body, MAX_SCANS):
            raise ValueError(f'it has more than {MAX_SCANS} scans, expected at most 20 or so')
        picture.draft(None, (4 * VIEW, 4 * VIEW))
        return ImageOps.exif_transpose(picture)
    except Image.UnidentifiedImageError:
        found = f'begins with {body[:12]!r}'
        if body[4:10] in (b'ftyphe', b'ftypmi'):  # heic, heix, mif1, ...
            found = 'is HEIC, as iPhones save photographs'
        raise ValueError(f'it {found}, expected {", ".join(KINDS)}: save it as JPEG or PNG'
                         ) from None
    except Exception as error:  # of all kinds, if a file is damaged
        raise ValueError(f'it cannot be unpacked: {error}; save it anew as JPEG or PNG') from None


def has_more_scans(body, most):
    """Whether the first image in a JPEG file's bytes has more than so many scans.

    The segments of a JPEG (ITU-T T.81, annex B) begin with FF and a marker, and most of them with
    their length. DA begins a scan, in whose data FF is followed by 00 or by a restart, D0 to D7; D9
    ends the image.
    """
    place = scans = 0
    while scans <= most:
        marker = re.compile(rb'\xff([^\x00\x01\xd0-\xd8\xff])').search(body, place)
        if not marker or marker[1] == b'\xd9':
            return False
        scans += marker[1] == b'\xda'
        place = marker.end() + int.from_bytes(body[marker.end():marker.end() + 2], 'big')
    return True
