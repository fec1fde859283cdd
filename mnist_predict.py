"""Reads pictures of handwritten digits with the network that `mnist_deep.py` has trained.

    python mnist_deep.py --model_dir model
    python mnist_predict.py photo1.png photo2.jpg --model_dir model

A picture shows one digit: dark on light or light on dark, anywhere in it. For each one, a line says
the digit and its probability, and the second guess if that is below 90 %. A picture that cannot be
read is named on standard error; the others are read all the same, and the exit code is 1.
"""

import argparse
import contextlib
import math
import os
import stat
import struct
import sys

import numpy as np

import mnist_deep
import model_dir

tf = mnist_deep.tf

VIEW = 192  # pixels: pictures are looked at in this size, or smaller


def normalise(picture):
    """Makes a picture of one digit look like MNIST's.

    This is most of the work: a picture that was merely resized is something that the network has
    never seen.

    MNIST's recipe, from its home page (Y. LeCun, C. Cortes, C. J. C. Burges,
    http://yann.lecun.com/exdb/mnist/): the black and white digits of NIST's Special Databases 1 and
    3 were scaled to fit into 20x20 pixels, width and height alike, which gave them grey levels, and
    placed in 28x28 pixels with their centre of mass in the middle.

    Args:
        picture: uint8 array [height, width], or [height, width, channels] of 1 (grey), 2 (grey,
            alpha), 3 (RGB) or 4 (RGBA) channels. Ink may be dark on light or light on dark, and the
            digit anywhere.

    Returns:
        float32 array [784], values in [0, 1]: the digit as `mnist_deep.deepnn` takes it.

    Raises:
        ValueError: no ink is found, or nothing but ink; or the array has another shape or type.
    """
    grey = to_grey(picture)
    if is_normalised(grey):
        ink = np.abs(grey - grey[0, 0])
        return (ink / ink.max()).reshape(784)

    grey = closer(grey)
    height, width = grey.shape
    scale = max(1, max(height, width) / VIEW)
    ink, is_ink = find_ink(resize(grey, math.ceil(height / scale), math.ceil(width / scale)))

    # Scale it to fit into 20x20, and place its centre of mass in the middle of 28x28.
    top, bottom, left, right = bounding_box(is_ink)
    digit = ink[top:bottom, left:right]
    height, width = (max(1, round(length * 20 / max(digit.shape))) for length in digit.shape)
    digit = resize(digit, height, width)
    digit /= digit.max()
    y = (digit.sum(1) @ np.arange(height) + 0.5 * digit.sum()) / digit.sum()
    x = (digit.sum(0) @ np.arange(width) + 0.5 * digit.sum()) / digit.sum()
    top, left = min(max(round(14 - y), 0), 28 - height), min(max(round(14 - x), 0), 28 - width)
    image = np.zeros([28, 28], np.float32)
    image[top:top + height, left:left + width] = digit
    return image.reshape(784)


def closer(grey):
    """Cuts a large picture down to the digit and the paper around it: float32 in and out."""
    while max(grey.shape) > VIEW:
        # On average over large blocks thin strokes would fade away: take the darkest part of each.
        side = math.ceil(max(grey.shape) / (4 * VIEW))
        view = blocks(dark_on_light(blocks(grey, side, np.mean)), 4, np.min)
        side *= 4
        ink = paper_around(view, VIEW // 8 | 1) - view
        is_ink = ink > 0.5 * ink.max()
        if not is_ink.any():
            return grey

        # The piece with the most ink, and those that are near: a 5's bar may stand apart.
        numbers = pieces(is_ink)
        largest = np.bincount(numbers.ravel(), (ink * is_ink).ravel()).argmax()
        top, bottom, left, right = bounding_box(numbers == largest)
        size = max(bottom - top, right - left)
        rows, columns = margin(top, bottom, size), margin(left, right, size)
        near = np.zeros_like(is_ink)
        near[rows, columns] = is_ink[rows, columns]
        top, bottom, left, right = bounding_box(near)
        size = max(bottom - top, right - left)
        if size > 0.45 * max(view.shape):
            return grey
        wide = 0.35 * size + 1
        grey = grey[margin(top * side, bottom * side, wide * side),
                    margin(left * side, right * side, wide * side)]
    return grey


def margin(start, end, size):
    """The slice from start to end, longer by so much on both sides."""
    return slice(max(0, int(start - size)), int(end + size))


def blocks(grey, side, function):
    """One value for each block of side x side pixels, by np.mean or np.min."""
    height, width = grey.shape
    grey = np.pad(grey, [(0, -height % side), (0, -width % side)], mode='edge')
    return function(grey.reshape(len(grey) // side, side, -1, side), axis=(1, 3))


def dark_on_light(view):
    """Inverts the grey values, 0 to 255, if the ink is lighter than the paper."""
    # There is less ink than paper, so ink differs most from what is around it. Light that changes
    # slowly, or at the edge of a shadow, differs as much to one side as to the other.
    away = max(1, max(view.shape) // 8)
    wide = np.pad(view, away, mode='edge')
    around = (wide[2 * away:, away:-away] + wide[:-2 * away, away:-away]
              + wide[away:-away, 2 * away:] + wide[away:-away, :-2 * away]) / 4
    differs = view - around
    return 255 - view if ((differs - np.median(differs)) ** 3).sum() > 0 else view


def paper_around(view, window):
    """The paper without its ink: all that is dark and narrower than a window is filled up."""
    return slide(slide(view, window, np.maximum), window, np.minimum)


def find_ink(view):
    """Tells ink from paper.

    Args:
        view: float32 array [height, width], grey values 0 to 255.

    Returns:
        ink: float32 array [height, width], how much ink is where, from 0 (paper) to 1.
        is_ink: bool array [height, width], where the digit's strokes are, without specks.

    Raises:
        ValueError: nothing stands out as a digit does.
    """
    view = dark_on_light(view)

    # A large window is wider than the broadest stroke, a small one follows the edge of a shadow:
    # take the one whose ink stands out best.
    best, found = 0, None
    for part in (2, 3, 5, 8):
        window = max(view.shape) // part | 1
        ink = paper_around(view, window) - view
        if ink.max() - ink.min() < 1:
            continue
        is_ink = ink > otsu_threshold(ink)
        share = is_ink.mean()
        contrast = ink[is_ink].mean() - ink[~is_ink].mean()
        separation = share * (1 - share) * contrast ** 2 / ink.var()  # 1: two grey values, no more
        if separation * contrast > best:
            best, found = separation * contrast, (ink, is_ink, contrast, separation)
    if found is None:
        raise ValueError('no digit: it has one brightness all over, no ink or nothing but ink')
    ink, is_ink, contrast, separation = found

    # A digit stands out from the paper's own unrest, and its strokes are coherent. The bounds lie
    # between what digits have and what pictures of nothing but light, shadow and noise have.
    unrest = 1.5 * np.median(np.abs(ink[~is_ink] - np.median(ink[~is_ink])))
    edges = (is_ink[1:] != is_ink[:-1]).sum() + (is_ink[:, 1:] != is_ink[:, :-1]).sum()
    by_chance = 4 * is_ink.sum() * (1 - is_ink.mean())  # if each pixel were drawn on its own
    roughness = edges / by_chance
    if contrast < 20 or contrast < 6 * unrest or separation < 0.72 or roughness > 0.85:
        raise ValueError('no digit: nothing on it stands out as ink on paper does')

    is_ink = without_specks(is_ink)
    base = np.median(ink[~is_ink])
    ink = (ink - base) / (np.median(ink[is_ink]) - base)
    near = slide(is_ink, 3, np.maximum)  # a stroke's grey edge belongs to it, too
    return np.where(near, np.clip(ink, 0, 1), 0).astype(np.float32), is_ink


def otsu_threshold(values):
    """The threshold that parts values, not all the same, into the two most separate groups.

    N. Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    counts, edges = np.histogram(values, 256)
    middles = (edges[1:] + edges[:-1]) / 2
    below, total = np.cumsum(counts)[:-1], counts.sum()
    sum_below = np.cumsum(counts * middles)[:-1]
    mean_below = sum_below / below  # the first and the last bin are never empty
    mean_above = ((counts * middles).sum() - sum_below) / (total - below)
    return edges[1 + np.argmax(below * (total - below) * (mean_above - mean_below) ** 2)]


def without_specks(is_ink):
    """Drops pieces with less than a twentieth of the largest one's pixels: bool in, bool out."""
    numbers = pieces(is_ink)
    sizes = np.bincount(numbers.ravel())
    sizes[0] = 0  # paper
    return (sizes >= 0.05 * sizes.max())[numbers] & is_ink


def pieces(is_ink):
    """Numbers the connected pieces: bool [height, width] to int, 0 for paper."""
    # Each pixel takes the largest number among its neighbours' until each piece has one number. A
    # number is also a pixel's place, counted from 1: what that one has taken is taken at once.
    numbers = np.where(is_ink, 1 + np.arange(is_ink.size).reshape(is_ink.shape), 0)
    while True:
        spread = np.where(is_ink, slide(numbers, 3, np.maximum), 0)
        if (spread == numbers).all():
            return numbers
        numbers = np.append(0, spread)[spread]


def bounding_box(is_ink):
    """top, bottom, left, right of the True pixels; bottom and right are one further."""
    rows, columns = np.flatnonzero(is_ink.any(1)), np.flatnonzero(is_ink.any(0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def slide(view, window, function):
    """np.maximum or np.minimum over a square window at each pixel: same shape; window: odd."""
    for _ in range(2):  # down the columns and, once transposed, along the rows
        view = np.pad(view, [(window // 2, window // 2), (0, 0)], mode='edge')
        reach = 1
        while reach < window:  # each round can double the rows that a pixel has seen
            step = min(reach, window - reach)
            view = function(view[:-step], view[step:])
            reach += step
        view = view.T
    return view


def resize(picture, height, width):
    """Averages [h, w] to [height, width], as tf.image.resize does with method='area'."""
    def boxes(n, m):  # [m, n]: row i has the share of each of the n pixels in the i-th of m boxes
        edges = np.linspace(0, n, m + 1)
        low, high, pixel = edges[:-1, np.newaxis], edges[1:, np.newaxis], np.arange(n)
        shares = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, None)
        return (shares / (high - low)).astype(np.float32)
    return boxes(picture.shape[0], height) @ picture @ boxes(picture.shape[1], width).T


def to_grey(picture):
    """uint8 [height, width] or [height, width, channels] to float32 [height, width], 0 to 255."""
    picture = np.asarray(picture)
    channels = picture.shape[2] if picture.ndim == 3 else 1
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or channels not in (1, 2, 3, 4):
        raise ValueError(f'picture is {picture.dtype} {list(picture.shape)}, expected uint8 '
                         '[height, width] or [height, width, 1 to 4 channels]')
    if not picture.size:
        raise ValueError('no digit: it has no pixels')
    if picture.ndim == 2:
        return picture.astype(np.float32)
    # What a colour adds to the brightness: ITU-R BT.601, as in tf.image.rgb_to_grayscale.
    weights = [1] if channels < 3 else [0.299, 0.587, 0.114]
    grey = sum(np.float32(weight) * picture[..., c] for c, weight in enumerate(weights))
    if channels in (2, 4):  # as if it lay on white paper
        opacity = picture[..., -1] / np.float32(255)
        grey = 255 + (grey - 255) * opacity
    return grey


def is_normalised(grey):
    """Whether it is one of MNIST's images, or one made like them, in any two shades."""
    if grey.shape != (28, 28):
        return False
    ink = np.abs(grey - grey[0, 0])
    if ink[[0, 0, -1, -1], [0, -1, 0, -1]].any() or not ink.any():  # a corner is ink, or nothing is
        return False
    top, bottom, left, right = bounding_box(ink > 0)
    rows, columns = ink.sum(1) / ink.sum(), ink.sum(0) / ink.sum()
    middle = np.arange(28) + 0.5
    return (max(bottom - top, right - left) <= 20
            and abs(rows @ middle - 14) < 1 and abs(columns @ middle - 14) < 1)


def main(argv=None):
    """Reads the pictures; `argv` are the command line's arguments, sys.argv's if None.

    Returns:
        The exit code: 0, or 1 if a picture could not be read.
    """
    flags = parse_flags(argv)
    with tf.Graph().as_default():
        return read(flags)


def read(flags):
    """Reads the pictures in the default graph; returns the exit code."""
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    probabilities = tf.nn.softmax(y_conv)
    decoder = Decoder()

    with tf.Session() as sess:
        model_dir.restore_newest(flags.model_dir)
        failed = False
        for first in range(0, len(flags.pictures), 100):
            images, names = [], []
            for name in flags.pictures[first:first + 100]:
                try:
                    images.append(normalise(decoder.read(name)))
                    names.append(name)
                    if flags.show:
                        decoder.show(images[-1], name, flags.show)
                except (OSError, ValueError) as error:
                    failed = True
                    print(f'{name}: {getattr(error, "strerror", None) or error}', file=sys.stderr)
            if images:
                for name, row in zip(names, sess.run(probabilities, {x: images, keep_prob: 1.0})):
                    print(f'{name}: {answer(row)}', flush=True)
    return 1 if failed else 0


def answer(probabilities):
    """The likeliest class of a row of 10 and, if it has less than 90 %, the next one, as text."""
    second, first = np.argsort(probabilities)[-2:]
    text = f'{first} ({probabilities[first]:.1%})'
    if probabilities[first] < 0.9:
        text += f', or {second} ({probabilities[second]:.1%})'
    return text.replace('%', ' %')


# The tutorial ends here. The rest is for files and flags.

MAX_PIXELS = 50_000_000  # a picture that promises more is not decoded
MAX_BYTES = 100_000_000  # nor is a larger file read
KINDS = {b'\x89PNG\r\n\x1a\n': 'PNG', b'\xff\xd8\xff': 'JPEG', b'GIF87a': 'GIF', b'GIF89a': 'GIF',
         b'BM': 'BMP'}  # what their files begin with


class Decoder:
    """Reads and writes picture files by TensorFlow's own operations, in the default session."""

    def __init__(self):
        self.body = tf.placeholder(tf.string, shape=[])
        self.decoded = {'PNG': tf.image.decode_png(self.body, channels=4),
                        'JPEG': tf.image.decode_jpeg(self.body, channels=3),
                        'GIF': tf.image.decode_gif(self.body)[0],
                        'BMP': tf.image.decode_bmp(self.body)}
        self.jpeg_shape = tf.image.extract_jpeg_shape(self.body)
        self.pixels = tf.placeholder(tf.uint8, shape=[None, None, 1])
        self.encoded = tf.image.encode_png(self.pixels)

    def read(self, name):
        """The picture in a file, or on standard input if the name is -: uint8 [height, width, n].

        Raises:
            OSError: the file cannot be read.
            ValueError: what it holds is no picture, is damaged, or is too large.
        """
        body = read_bytes(name)
        kind = next((kind for start, kind in KINDS.items() if body.startswith(start)), None)
        if kind is None:
            raise ValueError(f'no picture: it begins with {body[:8]!r}, expected a PNG, JPEG, GIF '
                             'or BMP file')
        try:
            with libraries_silent():
                if kind == 'PNG':
                    width, height = struct.unpack('>II', body[16:24])
                elif kind == 'JPEG':
                    height, width, _ = self.jpeg_shape.eval({self.body: body}).tolist()
                elif kind == 'GIF':
                    body, width, height = first_frame(body)
                else:
                    width, height = map(abs, struct.unpack('<ii', body[18:26]))
                if width * height > MAX_PIXELS:
                    raise ValueError(f'{width:,} x {height:,} pixels, expected at most '
                                     f'{MAX_PIXELS:,}: make it smaller')
                picture = self.decoded[kind].eval({self.body: body})
        except (tf.errors.OpError, struct.error, IndexError):
            raise ValueError(f'a {kind} file that cannot be decoded: it is damaged, cut off or of '
                             'an unusual kind; save it anew as PNG') from None
        return upright(picture, body) if kind == 'JPEG' else picture

    def show(self, image, name, folder):
        """Writes what the network sees, float32 [784], into a folder, as PNG of 280x280 pixels.

        It is named after the picture: name.png or, if there is one, name-2.png, name-3.png, ...
        """
        stem = 'stdin' if name == '-' else os.path.splitext(os.path.basename(name))[0]
        pixels = np.round(image.reshape(28, 28, 1) * 255).astype(np.uint8)
        png = self.encoded.eval({self.pixels: pixels.repeat(10, axis=0).repeat(10, axis=1)})
        number = 1
        while True:
            path = os.path.join(folder, f'{stem}.png' if number == 1 else f'{stem}-{number}.png')
            try:
                with open(path, 'xb') as f:
                    f.write(png)
                return
            except FileExistsError:
                number += 1


@contextlib.contextmanager
def libraries_silent():
    """Keeps off the screen what libjpeg and others write to file descriptor 2 of a damaged file."""
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def read_bytes(name):
    """What a file holds, or standard input if the name is -."""
    if name == '-':
        body = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        mode = os.stat(name).st_mode
        if not stat.S_ISREG(mode):  # a pipe or a device may never end
            raise ValueError('a folder, expected a picture file' if stat.S_ISDIR(mode) else
                             'not a file, but a pipe or a device, expected a picture file')
        with open(name, 'rb') as f:
            body = f.read(MAX_BYTES + 1)
    if not body:
        raise ValueError('an empty file, expected a picture')
    if len(body) > MAX_BYTES:
        raise ValueError(f'more than {MAX_BYTES:,} bytes: make it smaller')
    return body


def first_frame(body):
    """A GIF's first frame, as a GIF of its own, its width and its height.

    An animation may have any number of frames, and TensorFlow decodes all of them. The format is in
    https://www.w3.org/Graphics/GIF/spec-gif89a.txt; IndexError, struct.error: the file is cut off.
    """
    def color_table(flags):  # its size in bytes
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    width, height, flags = struct.unpack('<HHB', body[6:11])
    at = 13 + color_table(flags)
    while True:
        kind = body[at]
        if kind == 0x2C:  # an image: its descriptor, its colours, its data
            left, top, frame_width, frame_height, flags = struct.unpack(
                '<HHHHB', body[at + 1:at + 10])
            width, height = max(width, left + frame_width), max(height, top + frame_height)
            at += 11 + color_table(flags)
        elif kind == 0x21:  # an extension
            at += 2
        else:
            raise ValueError('a GIF without an image')
        while body[at]:  # blocks, each behind its length, and a 0 at the end
            at += 1 + body[at]
        at += 1
        if kind == 0x2C:
            return body[:at] + b';', width, height


def upright(picture, body):
    """Turns a JPEG as its camera was held: cameras note it in Exif's Orientation, 1 to 8.

    Exif is a TIFF file in a JPEG's first segments: https://www.cipa.jp/std/documents/e/DC-008-2012_E.pdf
    """
    start = body[:65536].find(b'Exif\0\0') + 6
    order = {b'II*\0': '<', b'MM\0*': '>'}.get(body[start:start + 4])
    if start < 6 or order is None:
        return picture
    try:
        offset, = struct.unpack_from(f'{order}I', body, start + 4)
        count, = struct.unpack_from(f'{order}H', body, start + offset)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(f'{order}HHIH', body,
                                                  start + offset + 2 + 12 * entry)
            if tag == 0x0112:
                if value in (5, 6, 7, 8):
                    picture = picture.transpose(1, 0, 2)
                if value in (3, 4, 7, 8):  # upside down
                    picture = picture[::-1]
                if value in (2, 3, 6, 7):  # left and right changed
                    picture = picture[:, ::-1]
    except struct.error:
        pass  # a broken note says nothing
    return picture


def parse_flags(argv):
    """The flags; OSError: the folder of --show cannot be made."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__)
    parser.add_argument('pictures', nargs='+', metavar='PICTURE',
                        help='a PNG, JPEG, GIF or BMP file, or - for one on standard input')
    parser.add_argument('--model_dir', default='model', metavar='FOLDER',
                        help='where mnist_deep.py --model_dir has put its checkpoints (default: '
                        '%(default)s)')
    parser.add_argument('--show', metavar='FOLDER',
                        help='also write here what the network sees of each picture, ten times '
                        'enlarged; no file is replaced')
    flags = parser.parse_args(argv)
    if flags.show:
        try:
            os.makedirs(flags.show, exist_ok=True)
        except OSError as error:
            raise OSError(f'--show {flags.show}: {error.strerror}') from error
    return flags


if __name__ == '__main__':
    sys.exit(mnist_deep.run(main))
