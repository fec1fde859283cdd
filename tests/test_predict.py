"""Part three of the tutorial: pictures to MNIST's form, and the command that reads them."""

import io
import os
import re
import runpy
import shutil
import signal
import struct
import sys
import tempfile
import zlib

import numpy as np
import pytest
from conftest import DATA, fork, own_lines, peak_kilobytes
from photographs import Camera, drawn
from PIL import Image
from scipy import ndimage

import input_data
import mnist_deep
from extras import pictures, predict

tf = mnist_deep.tf
TEST = input_data.read_data_sets(DATA).test


@pytest.fixture(scope='module')
def model(trained):
    """A model folder after a few hundred steps."""
    return trained[0]


@pytest.fixture(scope='module')
def network(model):
    """What the trained network answers, class numbers [n], to images [n, 784]."""
    with tf.Graph().as_default():
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_conv, keep_prob = mnist_deep.deepnn(x)
        with tf.Session() as sess:
            tf.train.Saver().restore(sess, tf.train.latest_checkpoint(model))

            def answers(images):
                images = np.asarray(images)
                return np.concatenate([
                    sess.run(y_conv, {x: images[i:i + 200], keep_prob: 1.0}).argmax(1)
                    for i in range(0, len(images), 200)])
            yield answers


@pytest.fixture(scope='module')
def camera():
    return Camera(seed=0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder of pictures: good ones in each format, and bad ones."""
    folder = tmp_path_factory.mktemp('pictures')
    seven, one = (Image.fromarray(drawing(label)[..., 0]) for label in (7, 1))
    for kind in ('png', 'jpg', 'bmp', 'webp', 'tif'):
        seven.save(folder / f'seven.{kind}')
    for kind in ('gif', 'png', 'tif'):  # the first of two is read
        seven.save(folder / f'seven, one.{kind}', save_all=True, append_images=[one])
    for name in ('seven.png', 'seven.jpg', 'seven.webp', 'seven.tif', 'seven, one.gif'):
        body = (folder / name).read_bytes()
        (folder / f'cut {name}').write_bytes(body[:len(body) // 2])
        (folder / f'header {name}').write_bytes(body[:12])
    (folder / 'empty').write_bytes(b'')
    (folder / 'text').write_text('This is a digit: 7')
    (folder / 'photo.heic').write_bytes(b'\0\0\0\x18ftypheic' + bytes(100))
    seven.save(folder / 'damaged.tif', compression='tiff_lzw')
    body = bytearray((folder / 'damaged.tif').read_bytes())
    body[100:200] = bytes(100)  # its pixels come first
    (folder / 'damaged.tif').write_bytes(body)
    (folder / 'drawing.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / 'bomb.png').write_bytes(png_file(60000, 60000, zlib.compress(bytes(1000))))
    (folder / 'large.png').write_bytes(png_file(10000, 6000, zlib.compress(bytes(1000))))
    (folder / 'bomb.gif').write_bytes(b'GIF89a' + struct.pack('<HH', 60000, 60000) + bytes(3)
                                      + b',' + bytes(9) + b'\2\0;')
    (folder / 'long.png').write_bytes(png_file(1, 5_000_000, zlib.compress(bytes(1000))))
    (folder / 'tall.png').write_bytes(png_file(1, 5000, zlib.compress(bytes(10_000))))
    seven.save(folder / 'seven, progressive.jpg', progressive=True)
    body = (folder / 'seven, progressive.jpg').read_bytes()[:-2]
    scan = bytes.fromhex('ffda 0008 0101 0001 3f00')  # of no pixel, and yet of the whole picture
    (folder / 'scans.jpg').write_bytes(body + 200 * scan + b'\xff\xd9')
    # FF 01 has no length, whatever follows it: a reader that skips one passes over the scans.
    (folder / 'hidden scans.jpg').write_bytes(body + b'\xff\x01' + 200 * scan + b'\xff\xd9')
    noise = np.random.RandomState(0).randint(0, 256, (200, 200))
    for name, levels in (('pixel', [[7]]), ('white', np.full([200, 200], 255)),
                         ('black', np.zeros([200, 200])), ('noise', noise)):
        Image.fromarray(np.uint8(levels)).save(folder / f'{name}.png')
    os.mkfifo(folder / 'pipe')
    (folder / 'folder').mkdir()
    return folder


def drawing(label, size=(180, 150)):
    """A digit of the test set on white, dark, larger: uint8 [height, width, 1]."""
    digit = TEST.images[np.flatnonzero(TEST.labels == label)[0]].reshape(28, 28)
    page = np.full([*size, 1], 255, np.uint8)
    page[30:142, 20:132, 0] = 255 - np.round(255 * digit).astype(np.uint8).repeat(4, 0).repeat(4, 1)
    return page


def png_file(width, height, data, depth=8, color=0):
    """A PNG file with such a header and such data."""
    def chunk(kind, content):
        return (struct.pack('>I', len(content)) + kind + content
                + struct.pack('>I', zlib.crc32(kind + content)))
    return (b'\x89PNG\r\n\x1a\n'
            + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, color, 0, 0, 0))
            + chunk(b'IDAT', data) + chunk(b'IEND', b''))


# To MNIST's form

def test_mnists_own_digits_are_read_as_they_are(network):
    images = [pictures.normalise(np.round(image * 255).astype(np.uint8).reshape(28, 28))
              for image in TEST.images[:500]]
    right, right_directly = ((network(found) == TEST.labels[:500]).mean()
                             for found in (images, TEST.images[:500]))
    assert right >= 0.98 * right_directly > 0.85
    assert np.quantile([np.corrcoef(image, own)[0, 1]
                        for image, own in zip(images, TEST.images)], 0.01) > 0.8


def test_pasted_digits_are_read_as_the_digits_themselves(network, camera):
    random = np.random.RandomState(0)
    numbers = random.permutation(10000)[:100]
    images = []
    for number in numbers:
        size = int(np.exp(random.uniform(np.log(28), np.log(1000))))
        images.append(pictures.normalise(camera.photograph(TEST.images[number], size)))
    right, right_directly = ((network(found) == TEST.labels[numbers]).mean()
                             for found in (images, TEST.images[numbers]))
    assert right >= 0.97 * right_directly > 0.85
    # They are where MNIST has them: its centres of mass are rounded to whole pixels, ours are not.
    apart = [np.subtract(centre(found), centre(own))
             for found, own in zip(images, TEST.images[numbers])]
    assert np.abs(np.mean(apart, 0)).max() < 0.1 and np.std(apart, 0).max() < 0.35


def centre(image):
    """The centre of mass of a float32 array [784]."""
    return ndimage.center_of_mass(image.reshape(28, 28))


@pytest.mark.parametrize('light_ink', [True, False])
@pytest.mark.parametrize('size', [28, 100, 1000])
def test_the_result_is_light_on_dark_20_long_and_centred(size, light_ink, camera):
    image = pictures.normalise(camera.photograph(TEST.images[0], size, light_ink))
    assert image.dtype == np.float32 and image.shape == (784,)
    assert image.min() == 0 and image.max() == 1
    box, = ndimage.find_objects(np.uint8(image.reshape(28, 28) > 0.5))
    assert 19 <= max(side.stop - side.start for side in box) <= 21
    assert centre(image) == pytest.approx((14, 14), abs=0.05)


@pytest.mark.parametrize('change', [
    lambda page: page, lambda page: 255 - page, lambda page: page[..., 0],
    lambda page: page.repeat(3, axis=2), lambda page: page // 2 + 90,
    lambda page: np.uint8(page / 255 * (-200, 102, 0) + (200.5, 0.5, 0)),  # red on green, as bright
    lambda page: np.concatenate([page, np.full_like(page, 255)], axis=2),
    lambda page: np.concatenate([page // 9 * 0, 255 - page], axis=2),  # its ink is its opacity
    lambda page: np.concatenate([page.repeat(3, axis=2) // 9 * 0, 255 - page], axis=2),
    lambda page: np.concatenate([page // 9 * 0 + 255, 255 - page], axis=2),  # and white
    lambda page: np.concatenate([page.repeat(3, axis=2) // 9 * 0 + 255, 255 - page], axis=2),
    lambda page: np.dstack([page, 255 * np.uint8(np.hypot(*np.mgrid[-90:90, -75:75]) < 110)]),
    lambda page: np.pad(page, [(900, 0), (0, 700), (0, 0)], constant_values=255)])
def test_shade_colour_and_place_do_not_matter(change):
    expected = pictures.normalise(drawing(7))
    found = pictures.normalise(change(drawing(7)))
    assert np.abs(found - expected).mean() < 0.01


@pytest.mark.parametrize('height', [8, 4000])
def test_a_digit_may_be_8_or_4000_pixels_high(height, network, camera):
    right = 0
    numbers = range(20) if height == 8 else range(4)
    for number in numbers:
        large = camera.enlarge(TEST.images[number], 28 * 8)
        size = round(28 * height / 20)
        page = 255 - 255 * (
            np.asarray(Image.fromarray(large).resize((size, size), Image.BOX)) if height == 8
            else camera.enlarge(TEST.images[number], size))
        image = pictures.normalise(np.round(page).astype(np.uint8))
        right += network([image])[0] == network(TEST.images[number:number + 1])[0]
    assert right >= 0.9 * len(numbers)


def test_a_small_digit_far_in_a_corner_of_a_large_photograph_is_found(network, camera):
    noise = np.tile(4 * np.random.RandomState(0).randn(100, 100), (30, 40))
    light = 1 - 0.3 * np.linspace(0, 1, 4000, dtype=np.float32)
    light[2000:] *= 0.7  # a shadow with a sharp edge
    right = []
    for number, (row, column) in zip(range(8), [(5, 5), (5, 3850), (2850, 5), (2850, 3850)] * 2):
        ink = np.zeros([3000, 4000], np.float32)
        ink[row:row + 140, column:column + 140] = camera.enlarge(TEST.images[number], 140)
        paper, stroke = (220, 50) if number < 4 else (50, 210)
        photo = light * (paper + (stroke - paper) * ink) + noise
        image = pictures.normalise(np.clip(photo, 0, 255).astype(np.uint8))
        right.append(network([image])[0] == network(TEST.images[number:number + 1])[0])
    assert sum(right) >= 7


def test_a_piece_that_stands_apart_stays_and_specks_go():
    page = np.full([200, 200], 255, np.uint8)
    page[40:52, 70:140] = 0  # a 5's bar, away from
    page[60:160, 70:82] = 0  # what is below it
    clean = pictures.normalise(page)
    assert clean.reshape(28, 28)[:9].max() > 0.9
    for row, column in ((3, 5), (190, 20), (100, 195), (8, 150)):
        page[row:row + 3, column:column + 3] = 0
    page[170:182, 150:156] = 0  # as much as a thirtieth of the ink, but beside it
    assert pictures.normalise(page) == pytest.approx(clean, abs=1e-3)
    page[100:112, 120:126] = 0  # what a pen left that hardly wrote
    assert np.abs(pictures.normalise(page) - clean).max() > 0.5


def test_a_stroke_broken_into_dots_is_no_specks():
    page = np.asarray(drawn(7)).copy()
    page[60:][np.arange(140) % 9 > 2] = 255  # each a fiftieth of the bar
    assert pictures.normalise(page).reshape(28, 28)[20:].max() > 0.3


def test_the_edge_of_a_shadow_is_no_ink(network):
    y, x = np.mgrid[-1:1:400j, -1:1:400j]
    right = []
    for number in range(20):
        page = 230 - 200 * np.pad(TEST.images[number].reshape(28, 28).repeat(9, 0).repeat(9, 1),
                                  [(70, 78), (100, 48)])
        shadow = 1 - 0.4 / (1 + np.exp((0.2 - x - y) / 0.05))
        right.append(network([pictures.normalise((page * shadow).astype(np.uint8))])[0]
                     == network(TEST.images[number:number + 1])[0])
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize('picture, message', [
    (np.zeros([1, 1], np.uint8), 'nothing on it stands out'),
    (np.zeros([100, 80], np.uint8), 'nothing on it stands out'),
    (np.full([100, 80, 3], 255, np.uint8), 'nothing on it stands out'),
    (np.zeros([100, 80, 4], np.uint8), 'nothing on it stands out'),
    (255 - 200 * np.uint8(np.hypot(*np.mgrid[-50:50, -40:40]) < 20), 'a blot, not the strokes'),
    (np.zeros([0, 5], np.uint8), r'uint8 \[0, 5\], expected uint8'),
    (np.zeros([5, 5]), r'float64 \[5, 5\], expected uint8'),
    (np.zeros([5], np.uint8), r'uint8 \[5\], expected uint8'),
    (np.zeros([5, 5, 5], np.uint8), r'uint8 \[5, 5, 5\], expected uint8')])
def test_what_shows_no_digit_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        pictures.normalise(picture)


@pytest.mark.parametrize('shape', [(1, 2), (1, 5000), (5000, 1), (3, 50000), (2, 3)])
def test_narrow_pictures_are_refused(shape):
    for pixels in (np.random.RandomState(0).randint(0, 256, shape), 200 * (np.eye(*shape) < 1)):
        with pytest.raises(ValueError, match='no digit'):
            pictures.normalise(pixels.astype(np.uint8))


@pytest.mark.parametrize('side', [28, 100, 400])
def test_pure_noise_and_empty_paper_are_refused(side):
    random = np.random.RandomState(0)
    light = 200 - 30 * np.mgrid[-1:1:side * 1j, -1:1:side * 1j][0]
    for picture in (random.randint(0, 256, [side, side]),
                    255 * random.randint(0, 2, [side, side]),
                    128 + 30 * random.randn(side, side),
                    light + 4 * random.randn(side, side)):
        with pytest.raises(ValueError, match='stands out'):
            pictures.normalise(np.clip(picture, 0, 255).astype(np.uint8))


@pytest.mark.parametrize('name, picture', [
    ('light that falls off', lambda x, y: 200 - 60 * x - 20 * y),
    ('the edge of a shadow', lambda x, y: 200 - 80 * (x + 0.3 * y > 0.2)),
    ('a shadow in the corner', lambda x, y: 200 - 80 * (x + 0.5 * y > 0.9)),
    ('a soft shadow', lambda x, y: 200 - 80 / (1 + np.exp(-(x + 0.3 * y) / 0.1))),
    ('two shadows', lambda x, y: 200 - 60 * (x > 0.2 * y) - 50 * (y > 0.3 * x + 0.2)),
    ('dark corners', lambda x, y: 230 - 90 * (x ** 2 + y ** 2)),
    ('a spot of light', lambda x, y: 60 + 120 * np.exp(-2 * (x ** 2 + y ** 2)))])
@pytest.mark.parametrize('noise', [0, 3])
def test_light_and_shadow_are_no_digit(name, picture, noise):
    for height, width in ((80, 100), (300, 400)):
        y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
        page = picture(x, y) + noise * np.random.RandomState(0).randn(height, width)
        with pytest.raises(ValueError, match='no digit'):
            pictures.normalise(np.clip(page, 0, 255).astype(np.uint8))


# Troubles of real pictures

def same(picture, expected, limit=0.04):
    """Whether a picture looks to the network as another one does, moved by a pixel at most."""
    found, expected = (pictures.normalise(each).reshape(28, 28)
                       for each in (picture, expected))
    return limit > min(np.abs(np.roll(found, (down, right), (0, 1)) - expected).mean()
                       for down in (-1, 0, 1) for right in (-1, 0, 1))


@pytest.mark.parametrize('digit', range(10))
@pytest.mark.parametrize('mode, colors', [('1', 2), ('P', 2), ('P', 4), ('P', 16), ('P', 256)])
def test_png_of_1_2_4_and_8_bits(digit, mode, colors, tmp_path):
    page = drawn(digit)
    coarse = page.convert('1') if mode == '1' else page.quantize(colors)
    coarse.save(tmp_path / 'page.png')
    assert same(tmp_path / 'page.png', page)


@pytest.mark.parametrize('side', [28, 64, 280])
def test_two_shades_are_enough(side, network):
    random = np.random.RandomState(0)
    numbers = random.permutation(10000)[:100]
    images = []
    for number in numbers:
        page = np.uint8(np.round(255 - 255 * TEST.images[number].reshape(28, 28)))
        page = Image.fromarray(page).resize((side, side), Image.BICUBIC)
        images.append(pictures.normalise(page.point(lambda level: 255 * (level > 127))))
    right, directly = ((network(found) == TEST.labels[numbers]).mean()
                       for found in (images, TEST.images[numbers]))
    assert right >= directly - 0.05  # of a network that has trained for 120 steps


@pytest.mark.parametrize('pen', [1, 2, 4, 8, 14, 20, 28, 40])
def test_pens_of_1_to_40_of_200_pixels_make_strokes_like_mnists(pen):
    holes = {0: 1, 6: 1, 8: 2, 9: 1}
    for digit in range(10):
        image = pictures.normalise(drawn(digit, pen)).reshape(28, 28)
        ink = image > 0.5
        width = 4 * ndimage.distance_transform_edt(ink)[ink].mean() - 2  # MNIST's: 1.4 to 4
        assert 1 < width < (5 if pen <= 28 else 8) and image.max() == 1
        assert ndimage.label(ink, np.ones([3, 3]))[1] == 1  # in one piece
        if pen <= 28:
            assert ndimage.label(~ink)[1] == 1 + holes.get(digit, 0)


@pytest.mark.parametrize('digit', range(10))
def test_faint_ink_on_clean_paper_is_read(digit):
    assert same(drawn(digit, shades=(255, 250)), drawn(digit))
    assert same(drawn(digit, shades=(5, 0)), drawn(digit))


def test_where_a_stroke_is_fainter_it_goes_on():
    for digit in range(10):
        ink = 255 - np.asarray(drawn(digit), float)
        ink[80:91] *= 0.4
        image = pictures.normalise(np.uint8(255 - 0.85 * ink)).reshape(28, 28)
        assert ndimage.label(image > 0.3, np.ones([3, 3]))[1] == 1, digit


@pytest.mark.parametrize('digit', range(10))
def test_a_date_stamp_the_edge_of_a_sheet_and_a_dark_strip_are_not_the_digit(digit):
    random = np.random.RandomState(digit)
    page = np.asarray(drawn(digit, 10, 120, (400, 300), (100, 60), (190, 60))).copy()
    page = np.clip(page + 3 * random.randn(300, 400), 0, 255).astype(np.uint8)
    stamp = page.copy()
    for left in range(280, 380, 10):
        stamp[280:290, left:left + random.randint(2, 8)] = 250
    edge = page.copy()
    edge[np.arange(300)[:, np.newaxis] > 285 + np.arange(400) / 40] = 40
    strip = page.copy()
    strip[:8] = 30
    side = page.copy()
    side[:, 385:] = 250
    for changed in (stamp, edge, strip, side):
        assert same(changed, page)


@pytest.mark.parametrize('digit', range(10))
def test_what_surrounds_the_digit_is_not_the_digit(digit):
    page = drawn(digit, 10, 110, (200, 200), (45, 45))
    frame = np.asarray(page).copy()
    frame[10:190, 10:190][[0, 1, 2, -3, -2, -1]] = frame[10:190, 10:190][:, [0, 1, -2, -1]] = 0
    assert same(frame, page)
    cell = np.asarray(page).copy()  # of a form, cut out with the next one's line
    cell[8:14] = cell[186:192] = cell[:, 6:12] = cell[:, 188:194] = 40
    assert same(cell, page) and same(cell[14:], page)
    table = np.asarray(drawn(digit, 10, 110, (280, 200), (120, 45))).copy()
    table[:, :12] = table[160:175] = 40  # beside the sheet and below it; then, it is light again
    assert same(table, page)
    panel = np.full([280, 320], 255, np.uint8)
    panel[40:240, 60:260] = 225 - np.asarray(page) // 255 * 195
    assert same(panel, page)
    y, x = np.mgrid[:400, :400]
    on_sheet = (x > 70 + y / 40) & (x < 320 - y / 50) & (y > 60 + x / 40) & (y < 350)
    sheet = np.where(on_sheet, 235, 50)
    sheet[100:300, 100:300][np.asarray(page) < 128] = 50
    assert same(np.uint8(sheet), page)


@pytest.mark.parametrize('digit', [2, 3, 4, 5, 6])
def test_a_digit_may_touch_the_border(digit):
    page = np.asarray(drawn(digit, 14, 160))
    rows, columns = ndimage.find_objects(np.uint8(page < 128))[0]
    assert same(page[rows, columns], page)
    assert same(page[:, columns.start:], page)


@pytest.mark.parametrize('digits', [(1, 0), (7, 3), (4, 2, 9), (0, 1, 2, 3, 4), (8, 8)])
@pytest.mark.parametrize('pen, size', [(2, 20), (8, 100), (20, 100)])
def test_several_digits_are_refused(digits, pen, size):
    row = np.concatenate([np.asarray(drawn(digit, pen, size, (size, size + 20), (0, 10)))
                          for digit in digits], axis=1)
    for page in (np.pad(row, size // 2, constant_values=255), 255 - row):
        with pytest.raises(ValueError, match=f'{len(digits)} digits side by side, expected one'):
            pictures.normalise(page)


def test_digits_of_two_strokes_are_read(network, camera):
    found, right = [], 0
    for digit in (0, 4, 5, 9):
        for pen in (12, 16, 21, 26):
            for gap in (0.15, 0.4, 0.65, 0.9):
                page = drawn(digit, pen, 220, (280, 280), (30, 30), gap=gap)
                if len(found) % 2:
                    page = camera.as_jpeg(camera.on_paper(1 - np.float32(page) / 255))
                try:
                    found.append(network([pictures.normalise(page)])[0])
                except ValueError:
                    found.append(None)
                right += found[-1] == digit
    assert 64 - found.count(None) >= 55
    assert right >= 48  # by a network that has trained for 120 steps


def test_two_digits_are_not_one_of_two_strokes(camera):
    random = np.random.RandomState(0)
    refused = 0
    for number in range(40):
        ink = np.zeros([36, 70], np.float32)
        left = 4
        for image in TEST.images[random.randint(0, 10000, 2)].reshape(2, 28, 28):
            image = image[:, image.any(0)]
            ink[4:32, left:left + image.shape[1]] = image
            left += image.shape[1] + random.randint(5, 11)  # of MNIST's pixels
        scale = random.randint(2, 9)
        ink = np.clip(Image.fromarray(ink).resize((70 * scale, 36 * scale), Image.BICUBIC), 0, 1)
        page = (camera.as_jpeg(camera.on_paper(ink)) if number % 2
                else np.round(255 - 255 * ink).astype(np.uint8))
        try:
            pictures.normalise(page)
        except pictures.SeveralDigits:
            refused += 1
    assert refused >= 34


def test_of_several_digits_there_is_an_image_of_all(network):
    page = np.asarray(drawn(0, 14, 200, (280, 280), (40, 40), gap=2))  # two arcs, far apart
    with pytest.raises(pictures.SeveralDigits, match='2 digits side by side') as refused:
        pictures.normalise(page)
    image = refused.value.image
    assert image.dtype == np.float32 and image.shape == (784,)
    assert image.min() == 0 and image.max() == 1
    near = pictures.normalise(drawn(0, 14, 200, (280, 280), (40, 40), gap=0.9))
    assert ndimage.label(image.reshape(28, 28) > 0.5)[1] == 2
    assert network([image])[0] == network([near])[0] == 0
    with pytest.raises(pictures.SeveralDigits):  # in a frame, too
        pictures.normalise(np.pad(np.pad(page, 20, constant_values=255), 5))


@pytest.mark.parametrize('seed', range(10))
def test_place_size_shades_and_depth_change_little(seed):
    random = np.random.RandomState(seed)
    digit, pen = random.randint(10), random.randint(6, 30)
    expected = drawn(digit, pen, 160)
    for _ in range(5):
        shades = random.permutation([random.randint(0, 90), random.randint(160, 256)]).tolist()
        width, height = random.randint(260, 500, 2).tolist()
        place = random.randint(0, [width - 240, height - 240]).tolist()
        page = drawn(digit, pen * 1.5, 240, (width, height), place, shades)
        scale = random.uniform(0.4, 3)
        page = page.resize((round(width * scale), round(height * scale)), Image.BICUBIC)
        assert same(page.quantize(16) if random.rand() < 0.3 else page, expected)


# The command

def test_a_line_for_each_picture_in_order(folder, model, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = ['seven.png', 'seven.jpg', 'seven.bmp', 'seven.webp', 'seven.tif', 'seven, one.gif',
             'seven, one.png', 'seven, one.tif', 'seven, progressive.jpg', 'seven.png']
    assert predict.main([*names, '--model_dir', str(model)]) == 0
    output, errors = capsys.readouterr()
    lines = output.splitlines()
    assert [line.split(':')[0] for line in lines] == names and errors == ''
    for line in lines:
        assert re.fullmatch(r'seven.*\.\w+: 7 \(\d+\.\d%\)(, or \d \(\d+\.\d%\))?', line)


@pytest.mark.parametrize('probabilities, text', [
    ([0, 0, 0, 0, 0, 0, 0, 0.998, 0.002, 0], '7 (99.8%)'),
    ([0, 0.039, 0, 0.712, 0, 0.249, 0, 0, 0, 0], '3 (71.2%), or 5 (24.9%)')])
def test_a_second_guess_is_told_below_90_percent(probabilities, text):
    assert predict.answer(np.array(probabilities)) == text


def test_pictures_may_stand_around_the_flags_and_as_a_pattern(folder, model, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / '[1].png').write_bytes((folder / 'seven.png').read_bytes())
    assert predict.main(['seven.jpg', '--model_dir', str(model), 'seven.*f', '[1].png', 'x*']) == 1
    output, errors = capsys.readouterr()
    assert [line.split(': 7')[0] for line in output.splitlines()] == [
        'seven.jpg', 'seven.tif', '[1].png']
    assert errors == 'x*: No such file or directory\n'


def test_a_picture_comes_from_standard_input(folder, model, monkeypatch, capsys):
    with open(folder / 'seven.png') as f:
        monkeypatch.setattr(sys, 'stdin', f)
        assert predict.main(['-', '--model_dir', str(model)]) == 0
    assert capsys.readouterr().out.startswith('-: 7 (')


def test_what_is_closed_or_cannot_be_printed_does_not_end_the_others(folder, model, tmp_path):
    odd = os.fsencode(tmp_path) + b'/\xff.png'
    shutil.copy(folder / 'seven.png', odd)
    process = fork('-c', 'import runpy, sys\n'
                   'sys.stdin = None\n'  # as Python has it after <&-
                   'del sys.modules["extras.predict"]\n'
                   'runpy.run_module("extras.predict", run_name="__main__")',
                   '-', os.fsdecode(odd), 'seven.png', '--model_dir', model, cwd=folder)
    output, errors = process.communicate()
    assert (process.returncode, own_lines(errors)) == (1, '-: standard input is closed\n')
    assert [line.split(' (')[0] for line in output.splitlines()] == [
        f'{tmp_path}/\\udcff.png: 7', 'seven.png: 7']


UNPACKED, SAVE = 'it cannot be unpacked: ', 'as JPEG or PNG'
BAD = {
    'missing.png': 'No such file or directory',
    **dict.fromkeys(['folder', 'pipe', '/dev/zero'], 'a folder, a pipe or a device, expected a'),
    'empty': '0 bytes, expected 1 to', 'text': "begins with b'This is a di', expected PNG, JPEG",
    'photo.heic': 'it is HEIC, as iPhones save photographs, expected', 'drawing.svg': SAVE,
    'damaged.tif': UNPACKED,
    **{f'cut {name}': UNPACKED for name in ('seven.png', 'seven.jpg', 'seven.webp', 'seven.tif',
                                            'seven, one.gif')},
    **{f'header {name}': SAVE for name in ('seven.png', 'seven.jpg', 'seven.tif',
                                           'seven, one.gif')},
    'large.png': 'it has 10,000 x 6,000 pixels, expected at most 50,000,000',
    'long.png': 'it has 1 x 5,000,000 pixels, expected at most 50,000,000, and 65,535 on a side',
    'scans.jpg': 'it has more than 100 scans', 'hidden scans.jpg': 'it has more than 100 scans',
    'bomb.png': 'exceeds limit', 'bomb.gif': 'exceeds limit',
    **dict.fromkeys(['pixel.png', 'white.png', 'black.png', 'tall.png', 'noise.png'], 'stands out')}


def test_each_bad_picture_is_one_line_and_the_others_are_read(folder, model, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    assert predict.main(['seven.png', *BAD, 'seven.jpg', '--model_dir', str(model)]) == 1
    output, errors = capfd.readouterr()  # what libraries print by themselves, too
    assert [line.split(' (')[0] for line in output.splitlines()] == [
        'seven.png: 7', 'seven.jpg: 7']
    lines = own_lines(errors).splitlines()
    assert [line.split(': ')[0] for line in lines] == list(BAD)
    for line, message in zip(lines, BAD.values()):
        assert message in line


def test_a_file_without_permission_is_one_line(folder, model, monkeypatch, capsys):
    with tempfile.TemporaryDirectory(dir='/tmp') as everyones:
        os.chmod(everyones, 0o755)
        secret = os.path.join(everyones, 'secret.png')
        shutil.copy(folder / 'seven.png', secret)
        os.chmod(secret, 0)
        if os.geteuid() == 0:  # who may read every file: let somebody else read it
            def as_nobody(name, read=pictures.open_picture):
                os.seteuid(65534)
                try:
                    return read(name)
                finally:
                    os.seteuid(0)
            monkeypatch.setattr(predict, 'open_picture', as_nobody)
        assert predict.main([secret, '--model_dir', str(model)]) == 1
    assert capsys.readouterr() == ('', f'{secret}: Permission denied\n')


@pytest.mark.parametrize('depth, color, pixel', [
    (16, 0, lambda ink: struct.pack('>H', 65535 - 257 * ink)),
    (8, 4, lambda ink: bytes([0, ink])), (8, 6, lambda ink: bytes([0, 0, 0, ink])),
    (8, 2, lambda ink: bytes([255 - ink] * 3)), (16, 6, lambda ink: bytes([0] * 6 + [ink, ink]))])
def test_png_of_16_bits_with_colour_or_with_transparency(depth, color, pixel, tmp_path):
    page = drawing(7)[..., 0]
    rows = [b'\0' + b''.join(pixel(255 - int(grey)) for grey in row) for row in page]
    file = tmp_path / 'page.png'
    file.write_bytes(png_file(page.shape[1], page.shape[0], zlib.compress(b''.join(rows)), depth,
                              color))
    assert np.abs(pictures.normalise(file) - pictures.normalise(page)).max() < 0.02


@pytest.mark.parametrize('change', [
    lambda page: page.convert('CMYK'), lambda page: page.convert('I'),
    lambda page: Image.fromarray(np.float32(page) / 255),
    lambda page: Image.fromarray(np.insert(np.float32(page), 0, np.nan, axis=0)),
    lambda page: Image.fromarray(np.uint16(page) * 16)])
def test_tiff_of_four_inks_of_large_numbers_and_of_fractions(change, tmp_path):
    page = Image.fromarray(drawing(7)[..., 0])
    change(page).save(tmp_path / 'page.tif')
    assert same(tmp_path / 'page.tif', page)


def test_a_palette_with_a_transparent_colour(tmp_path):
    page = Image.fromarray(drawing(7)[..., 0])
    page.point(lambda level: 128 * (level > 127)).save(tmp_path / 'page.png', transparency=128)
    page.convert('P').save(tmp_path / 'palette.png', transparency=255)
    assert same(tmp_path / 'page.png', page) and same(tmp_path / 'palette.png', page)


@pytest.mark.parametrize('orientation, turn', [
    (1, lambda page: page), (2, np.fliplr), (3, lambda page: np.rot90(page, 2)), (4, np.flipud),
    (5, lambda page: page.transpose(1, 0, 2)), (6, np.rot90),
    (7, lambda page: np.rot90(page, 2).transpose(1, 0, 2)), (8, lambda page: np.rot90(page, -1))])
def test_a_photograph_is_turned_as_its_camera_was_held(orientation, turn):
    # The camera stored the page turned, and noted how to turn it back.
    exif, body = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(turn(drawing(7))[..., 0]).save(body, 'JPEG', exif=exif)
    body.seek(0)
    picture = np.asarray(pictures.open_picture(body), int)
    assert np.abs(picture - drawing(7)[..., 0]).mean() < 5


def test_show_writes_what_the_network_saw_and_replaces_nothing(folder, model, tmp_path, monkeypatch,
                                                               capsys):
    monkeypatch.chdir(folder)
    seen = tmp_path / 'new' / 'seen'
    for _ in range(2):
        predict.main(['seven.png', 'seven.jpg', 'text', '--model_dir', str(model),
                      '--show', str(seen)])
        assert capsys.readouterr().out.count('\n') == 2
    names = sorted(path.name for path in seen.iterdir())
    assert names == ['seven-2.png', 'seven-3.png', 'seven-4.png', 'seven.png']
    pixels = np.asarray(Image.open(seen / 'seven.png'))
    assert pixels.shape == (280, 280)
    image = pictures.normalise(drawing(7)).reshape(28, 28)
    assert pixels[::10, ::10] == pytest.approx(image * 255, abs=1)


def test_show_writes_what_is_refused(folder, model, tmp_path, capsys):
    two = tmp_path / 'two.png'
    Image.fromarray(np.hstack([drawn(1), drawn(0)])).save(two)
    files = [two, *(folder / f'{name}.png' for name in ('noise', 'large', 'tall'))]
    predict.main([*map(str, files), '--model_dir', str(model), '--show', str(tmp_path / 'seen')])
    assert capsys.readouterr().err.count('\n') == 4
    pages = {path.stem: Image.open(path) for path in (tmp_path / 'seen').iterdir()}
    assert sorted(pages) == ['noise', 'tall', 'two']  # and large.png was never unpacked
    with pytest.raises(pictures.SeveralDigits) as refused:
        pictures.normalise(two)
    assert np.asarray(pages['two'])[::10, ::10] == pytest.approx(
        refused.value.image.reshape(28, 28) * 255, abs=1)
    assert np.array_equal(pages['noise'], Image.open(folder / 'noise.png'))
    assert pages['tall'].size == (1, 280)


@pytest.mark.parametrize('flags, message', [
    (['--model_dir=none'], '--model_dir none: no checkpoint .*: python mnist_deep.py --model_dir'),
    (['--model_dir=other'], 'all its checkpoints are damaged; train another one: python mnist_'),
    (['--show=seven.png'], '--show seven.png: File exists; name another folder'),
    (['--show=/proc/seen'], '--show /proc/seen: No such file or directory; name another folder'),
    (['--steps=3'], 'unrecognized arguments: --steps=3')])
def test_bad_flags_end_in_one_line(flags, message, folder, model, monkeypatch, capsys):
    (folder / 'other').mkdir(exist_ok=True)
    (folder / 'other' / 'checkpoint').write_text('model_checkpoint_path: "mnist_deep.ckpt-1"')
    (folder / 'other' / 'mnist_deep.ckpt-1.index').write_text('damaged')
    (folder / 'other' / 'mnist_deep.ckpt-1.data-00000-of-00001').write_text('damaged')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['predict.py'])  # the line begins with it
    try:
        code = mnist_deep.run(lambda: predict.main(
            ['seven.png', '--model_dir', str(model), *flags]))
    except SystemExit as refused:  # by argparse
        code = refused.code
    output, errors = capsys.readouterr()
    assert re.search(f'^predict.py: error: .*{message}', errors.splitlines()[-1])
    assert (code, output) == (2, '')


@pytest.mark.parametrize('part', ['predict', 'draw'])
@pytest.mark.parametrize('package', ['PIL', 'scipy'])
def test_without_pillow_or_scipy_the_last_line_says_what_to_run(package, part, monkeypatch):
    for name in ('pictures', part):
        monkeypatch.delitem(sys.modules, f'extras.{name}', raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(ImportError, match=package) as refused:
        runpy.run_module(f'extras.{part}', run_name='__main__')
    assert str(refused.value).splitlines()[-1].endswith(': sh setup.sh extras')


def test_ctrl_c_is_one_line(folder, model):
    process = fork('-m', 'extras.predict', *['seven.png'] * 5000, '--model_dir', model, cwd=folder)
    assert process.stdout.readline().startswith('seven.png: 7')
    process.send_signal(signal.SIGINT)
    assert own_lines(process.communicate()[1]) == 'stopped\n'
    assert process.returncode == 130


def test_takes_at_most_1100_megabytes_with_a_photograph_of_12_megapixels(
        model, camera, tmp_path):
    photo = 200 + 3 * np.random.RandomState(0).randn(3000, 4000, 1).repeat(3, axis=2)
    photo[1000:1900, 2500:3400] -= 150 * camera.enlarge(TEST.images[0], 900)[..., np.newaxis]
    photo = Image.fromarray(photo.astype(np.uint8))
    photo.save(tmp_path / 'photo.jpg')
    photo.convert('RGBA').save(tmp_path / 'photo.png', compress_level=1)
    kilobytes, result = peak_kilobytes('-m', 'extras.predict', tmp_path / 'photo.jpg',
                                       tmp_path / 'photo.png', '--model_dir', model)
    assert 'photo.jpg: ' in result.stdout and 'photo.png: ' in result.stdout
    assert (result.returncode, result.stderr) == (0, '')
    assert 200e3 < kilobytes < 1.1e6


def test_help_tells_how_to_use_it(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        predict.main(['--help'])
    output = capsys.readouterr().out
    for text in ('sh setup.sh extras', 'python mnist_deep.py --model_dir model',
                 '--model_dir', '--show', 'PNG', 'below 90%,'):
        assert text in output
