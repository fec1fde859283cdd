"""Part three of the tutorial: pictures to MNIST's form, and the command that reads them."""

import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

import numpy as np
import pytest
from conftest import DATA, ENVIRONMENT, ROOT, own_lines, python
from photographs import Camera

import input_data
import mnist_deep
import mnist_predict

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
def folder(tmp_path_factory, camera):
    """A folder of pictures: good ones in each format, and bad ones."""
    folder = tmp_path_factory.mktemp('pictures')
    drawn = drawing(7)
    encoded = camera.session.run
    with camera.session.graph.as_default():
        png = encoded(tf.image.encode_png(drawn))
        jpeg = encoded(tf.image.encode_jpeg(drawn))
    (folder / 'seven.png').write_bytes(png)
    (folder / 'seven.jpg').write_bytes(jpeg)
    (folder / 'seven.gif').write_bytes(gif([drawn, drawing(1)]))
    (folder / 'seven.bmp').write_bytes(bmp(drawn))
    (folder / 'empty').write_bytes(b'')
    (folder / 'text').write_text('This is a digit: 7')
    (folder / 'cut.png').write_bytes(png[:len(png) // 2])
    (folder / 'cut.jpg').write_bytes(jpeg[:len(jpeg) // 2])
    (folder / 'cut.gif').write_bytes((folder / 'seven.gif').read_bytes()[:400])
    (folder / 'header.png').write_bytes(png[:12])
    (folder / 'header.jpg').write_bytes(jpeg[:3])
    (folder / 'header.gif').write_bytes(b'GIF89a')
    (folder / 'header.bmp').write_bytes(b'BM')
    (folder / 'bomb.png').write_bytes(png_file(60000, 60000, zlib.compress(bytes(1000))))
    (folder / 'bomb.gif').write_bytes(b'GIF89a' + struct.pack('<HH', 60000, 60000) + bytes(3)
                                      + b',' + bytes(9) + b'\2\0;')
    (folder / 'pixel.png').write_bytes(png_file(1, 1, zlib.compress(b'\0\7')))
    for name, values in (('white', 255), ('black', 0),
                         ('noise', np.random.RandomState(0).randint(0, 256, (200, 200)))):
        rows = np.broadcast_to(np.uint8(values), (200, 200))
        data = zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))
        (folder / f'{name}.png').write_bytes(png_file(200, 200, data))
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


def gif(frames):
    """An animated GIF of grey frames: its codes have 9 bits and are never packed."""
    height, width, _ = frames[0].shape
    grey = bytes(level for level in range(256) for _ in range(3))
    body = b'GIF89a' + struct.pack('<HHBBB', width, height, 0xf7, 0, 0) + grey
    for frame in frames:
        body += b'!\xf9\4\0\0\0\0\0,' + struct.pack('<HHHHB', 0, 0, width, height, 0) + b'\x08'
        codes = []
        for number, pixel in enumerate(frame.ravel().tolist()):
            if number % 200 == 0:
                codes.append(256)  # forget all, before codes need a tenth bit
            codes.append(pixel)
        bits = sum(code << 9 * place for place, code in enumerate([*codes, 257]))
        data = bits.to_bytes(9 * (len(codes) + 1) // 8 + 1, 'little')
        for start in range(0, len(data), 255):
            piece = data[start:start + 255]
            body += bytes([len(piece)]) + piece
        body += b'\0'
    return body + b';'


def bmp(picture):
    """A BMP file of a grey picture, in 24-bit colour."""
    height, width, _ = picture.shape
    rows = [(row.repeat(3).tobytes() + bytes(3))[:(3 * width + 3) // 4 * 4]
            for row in picture[::-1]]
    pixels = b''.join(rows)
    return (b'BM' + struct.pack('<IHHI', 54 + len(pixels), 0, 0, 54)
            + struct.pack('<IiiHHIIiiII', 40, width, height, 1, 24, 0, len(pixels), 0, 0, 0, 0)
            + pixels)


def predict(*arguments, **options):
    return python(ROOT / 'mnist_predict.py', *arguments, **options)


# To MNIST's form

def test_mnists_own_digits_stay_what_they_are(network):
    images = [mnist_predict.normalise(np.round(image * 255).astype(np.uint8).reshape(28, 28))
              for image in TEST.images]
    assert (network(images) == network(TEST.images)).mean() >= 0.995
    # Most of them are recognised as MNIST's, and stay the same, but for their largest value.
    assert np.mean([np.allclose(image, own, atol=0.05)
                    for image, own in zip(images, TEST.images)]) > 0.95


def test_pasted_digits_are_read_as_the_digits_themselves(network, camera):
    random = np.random.RandomState(0)
    numbers = random.permutation(10000)[:500]
    images = []
    for number in numbers:
        size = int(np.exp(random.uniform(np.log(28), np.log(1000))))
        images.append(mnist_predict.normalise(camera.photograph(TEST.images[number], size)))
    right, right_directly = ((network(found) == TEST.labels[numbers]).mean()
                             for found in (images, TEST.images[numbers]))
    assert right >= 0.97 * right_directly > 0.85


@pytest.mark.parametrize('light_ink', [True, False])
@pytest.mark.parametrize('size', [28, 100, 1000])
def test_the_result_is_light_on_dark_20_high_and_centred(size, light_ink, camera):
    image = mnist_predict.normalise(camera.photograph(TEST.images[0], size, light_ink))
    assert image.dtype == np.float32 and image.shape == (784,)
    assert image.min() == 0 and image.max() == 1
    image = image.reshape(28, 28)
    top, bottom, left, right = mnist_predict.bounding_box(image > 0)
    assert max(bottom - top, right - left) == 20
    for axis in (0, 1):
        assert abs(image.sum(1 - axis) @ np.arange(28) / image.sum() - 13.5) <= 0.51


@pytest.mark.parametrize('change', [
    lambda page: page, lambda page: 255 - page, lambda page: page[..., 0],
    lambda page: page.repeat(3, axis=2), lambda page: page // 2 + 90,
    lambda page: np.concatenate([page, np.full_like(page, 255)], axis=2),
    lambda page: np.concatenate([page // 9 * 0, 255 - page], axis=2),  # its ink is its opacity
    lambda page: np.concatenate([page.repeat(3, axis=2) // 9 * 0, 255 - page], axis=2),
    lambda page: np.pad(page, [(900, 0), (0, 700), (0, 0)], constant_values=255)])
def test_shade_colour_and_place_do_not_matter(change):
    expected = mnist_predict.normalise(drawing(7))
    found = mnist_predict.normalise(change(drawing(7)))
    assert np.abs(found - expected).mean() < 0.01


@pytest.mark.parametrize('height', [8, 4000])
def test_a_digit_may_be_8_or_4000_pixels_high(height, network, camera):
    right = 0
    numbers = range(20) if height == 8 else range(4)
    for number in numbers:
        large = camera.enlarge(TEST.images[number], 28 * 8)
        size = round(28 * height / 20)
        page = (255 - 255 * mnist_predict.resize(large, size, size) if height == 8
                else 255 - 255 * camera.enlarge(TEST.images[number], size))
        image = mnist_predict.normalise(np.round(page).astype(np.uint8))
        right += network([image])[0] == network(TEST.images[number:number + 1])[0]
    assert right >= 0.9 * len(numbers)


def test_a_small_digit_far_in_a_corner_of_a_large_photograph_is_found(network, camera):
    random = np.random.RandomState(0)
    light = 1 - 0.3 * np.linspace(0, 1, 4000, dtype=np.float32)
    light[2000:] *= 0.7  # a shadow with a sharp edge
    right = []
    for number, (row, column) in zip(range(8), [(5, 5), (5, 3850), (2850, 5), (2850, 3850)] * 2):
        ink = np.zeros([3000, 4000], np.float32)
        ink[row:row + 140, column:column + 140] = camera.enlarge(TEST.images[number], 140)
        paper, stroke = (220, 50) if number < 4 else (50, 210)
        photo = light * (paper + (stroke - paper) * ink) + 4 * random.randn(3000, 4000)
        image = mnist_predict.normalise(np.clip(photo, 0, 255).astype(np.uint8))
        right.append(network([image])[0] == network(TEST.images[number:number + 1])[0])
    assert sum(right) >= 7


def test_a_piece_that_stands_apart_stays_and_specks_go():
    page = np.full([200, 200], 255, np.uint8)
    page[40:52, 70:140] = 0  # a 5's bar, away from
    page[60:160, 70:82] = 0  # what is below it
    clean = mnist_predict.normalise(page)
    assert clean.reshape(28, 28)[:9].max() > 0.9
    for row, column in ((3, 5), (190, 20), (100, 195), (8, 150)):
        page[row:row + 3, column:column + 3] = 0
    assert (mnist_predict.normalise(page) == clean).all()


def test_the_edge_of_a_shadow_is_no_ink(network):
    y, x = np.mgrid[-1:1:400j, -1:1:400j]
    right = []
    for number in range(40):
        page = 230 - 200 * np.pad(TEST.images[number].reshape(28, 28).repeat(9, 0).repeat(9, 1),
                                  [(70, 78), (100, 48)])
        shadow = 1 - 0.4 / (1 + np.exp((0.2 - x - y) / 0.05))
        right.append(network([mnist_predict.normalise((page * shadow).astype(np.uint8))])[0]
                     == network(TEST.images[number:number + 1])[0])
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize('picture, message', [
    (np.zeros([1, 1], np.uint8), 'one brightness all over'),
    (np.zeros([100, 80], np.uint8), 'no ink or nothing but ink'),
    (np.full([100, 80, 3], 255, np.uint8), 'no ink or nothing but ink'),
    (np.zeros([0, 5], np.uint8), 'no pixels'),
    (np.zeros([5, 5]), r'float64 \[5, 5\], expected uint8'),
    (np.zeros([5], np.uint8), r'uint8 \[5\], expected uint8'),
    (np.zeros([5, 5, 5], np.uint8), r'uint8 \[5, 5, 5\], expected uint8')])
def test_what_shows_no_digit_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        mnist_predict.normalise(picture)


@pytest.mark.parametrize('shape', [(1, 2), (1, 5000), (5000, 1), (3, 50000), (2, 3)])
def test_narrow_pictures_are_refused(shape):
    for pixels in (np.random.RandomState(0).randint(0, 256, shape), 200 * (np.eye(*shape) < 1)):
        with pytest.raises(ValueError, match='no digit'):
            mnist_predict.normalise(pixels.astype(np.uint8))


@pytest.mark.parametrize('side', [28, 100, 400])
def test_pure_noise_and_empty_paper_are_refused(side):
    random = np.random.RandomState(0)
    light = 200 - 30 * np.mgrid[-1:1:side * 1j, -1:1:side * 1j][0]
    for picture in (random.randint(0, 256, [side, side]),
                    255 * random.randint(0, 2, [side, side]),
                    128 + 30 * random.randn(side, side),
                    light + 4 * random.randn(side, side)):
        with pytest.raises(ValueError, match='stands out'):
            mnist_predict.normalise(np.clip(picture, 0, 255).astype(np.uint8))


def test_resizing_averages_as_tensorflows_area_method_does():
    picture = np.random.RandomState(0).rand(37, 90).astype(np.float32)
    with tf.Graph().as_default(), tf.Session() as sess:
        for height, width in ((10, 20), (37, 45), (5, 90)):
            expected = sess.run(tf.image.resize(picture[..., np.newaxis], [height, width],
                                                method='area'))[..., 0]
            assert mnist_predict.resize(picture, height, width) == pytest.approx(expected, abs=1e-5)


# The command

def test_a_line_for_each_picture_in_order(folder, model):
    names = ['seven.png', 'seven.jpg', 'seven.gif', 'seven.bmp', 'seven.png']
    result = predict(*names, '--model_dir', model, cwd=folder)
    assert (result.returncode, result.stderr) == (0, '')
    lines = result.stdout.splitlines()
    assert [line.split(':')[0] for line in lines] == names
    for line in lines:
        assert re.fullmatch(r'seven\.\w+: 7 \(\d+\.\d %\)(, or \d \(\d+\.\d %\))?', line)


@pytest.mark.parametrize('probabilities, text', [
    ([0, 0, 0, 0, 0, 0, 0, 0.998, 0.002, 0], '7 (99.8 %)'),
    ([0, 0.039, 0, 0.712, 0, 0.249, 0, 0, 0, 0], '3 (71.2 %), or 5 (24.9 %)')])
def test_a_second_guess_is_told_below_90_percent(probabilities, text):
    assert mnist_predict.answer(np.array(probabilities)) == text


def test_a_picture_comes_from_standard_input(folder, model):
    with open(folder / 'seven.png', 'rb') as f:
        result = predict('-', '--model_dir', model, stdin=f)
    assert result.returncode == 0
    assert result.stdout.startswith('-: 7 (')


BAD = {
    'missing.png': 'No such file or directory', 'folder': 'a folder, expected a picture file',
    'pipe': 'a pipe or a device', '/dev/zero': 'a pipe or a device', 'empty': 'an empty file',
    'text': "begins with b'This is ', expected a PNG, JPEG, GIF or BMP file",
    'cut.png': 'cannot be decoded', 'cut.jpg': 'cannot be decoded', 'cut.gif': 'cannot be decoded',
    'header.png': 'cannot be decoded', 'header.jpg': 'cannot be decoded',
    'header.gif': 'cannot be decoded', 'header.bmp': 'cannot be decoded',
    'bomb.png': '60,000 x 60,000 pixels, expected at most 50,000,000',
    'bomb.gif': '60,000 x 60,000 pixels, expected at most 50,000,000',
    'pixel.png': 'no ink or nothing but ink', 'white.png': 'no ink or nothing but ink',
    'black.png': 'no ink or nothing but ink', 'noise.png': 'stands out'}


def test_each_bad_picture_is_one_line_and_the_others_are_read(folder, model):
    result = predict('seven.png', *BAD, 'seven.jpg', '--model_dir', model, cwd=folder)
    assert result.returncode == 1
    assert [line.split(' (')[0] for line in result.stdout.splitlines()] == [
        'seven.png: 7', 'seven.jpg: 7']
    lines = result.stderr.splitlines()
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
            def as_nobody(name, read=mnist_predict.read_bytes):
                os.seteuid(65534)
                try:
                    return read(name)
                finally:
                    os.seteuid(0)
            monkeypatch.setattr(mnist_predict, 'read_bytes', as_nobody)
        with tf.Graph().as_default():
            assert mnist_predict.main([secret, '--model_dir', str(model)]) == 1
    assert capsys.readouterr() == ('', f'{secret}: Permission denied\n')


@pytest.mark.parametrize('depth, color, pixel', [
    (16, 0, lambda ink: struct.pack('>H', 65535 - 257 * ink)),
    (8, 4, lambda ink: bytes([0, ink])), (8, 6, lambda ink: bytes([0, 0, 0, ink])),
    (8, 2, lambda ink: bytes([255 - ink] * 3)), (16, 6, lambda ink: bytes([0] * 6 + [ink, ink]))])
def test_png_of_16_bits_with_colour_or_with_transparency(depth, color, pixel, tmp_path, camera):
    page = drawing(7)[..., 0]
    rows = [b'\0' + b''.join(pixel(255 - int(grey)) for grey in row) for row in page]
    file = tmp_path / 'page.png'
    file.write_bytes(png_file(page.shape[1], page.shape[0], zlib.compress(b''.join(rows)), depth,
                              color))
    with camera.session.graph.as_default(), camera.session.as_default():
        picture = mnist_predict.Decoder().read(str(file))
    found = mnist_predict.normalise(picture)
    assert np.abs(found - mnist_predict.normalise(page)).max() < 0.02


@pytest.mark.parametrize('orientation, turn', [
    (1, lambda page: page), (2, np.fliplr), (3, lambda page: np.rot90(page, 2)), (4, np.flipud),
    (5, lambda page: page.transpose(1, 0, 2)), (6, np.rot90),
    (7, lambda page: np.rot90(page, 2).transpose(1, 0, 2)), (8, lambda page: np.rot90(page, -1))])
@pytest.mark.parametrize('order', ['<', '>'])
def test_a_photograph_is_turned_as_its_camera_was_held(orientation, turn, order, camera, tmp_path):
    # The camera stored the page turned, and noted how to turn it back.
    with camera.session.graph.as_default(), camera.session.as_default():
        body = camera.session.run(camera.jpeg, {camera.picture: turn(drawing(7))})
        tiff = ({'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}IH', 8, 1)
                + struct.pack(f'{order}HHIHHI', 0x0112, 3, 1, orientation, 0, 0))
        segment = b'Exif\0\0' + tiff
        body = body[:2] + b'\xff\xe1' + struct.pack('>H', 2 + len(segment)) + segment + body[2:]
        (tmp_path / 'photo.jpg').write_bytes(body)
        picture = mnist_predict.Decoder().read(str(tmp_path / 'photo.jpg'))
    assert np.abs(picture[..., :1].astype(int) - drawing(7)).mean() < 5


def test_show_writes_what_the_network_saw_and_replaces_nothing(folder, model, tmp_path, monkeypatch,
                                                               capsys):
    monkeypatch.chdir(folder)
    seen = tmp_path / 'new' / 'seen'
    for _ in range(2):
        with tf.Graph().as_default():
            mnist_predict.main(['seven.png', 'seven.jpg', 'text', '--model_dir', str(model),
                                '--show', str(seen)])
        assert capsys.readouterr().out.count('\n') == 2
    names = sorted(path.name for path in seen.iterdir())
    assert names == ['seven-2.png', 'seven-3.png', 'seven-4.png', 'seven.png']
    with tf.Graph().as_default(), tf.Session() as sess:
        pixels = sess.run(tf.image.decode_png((seen / 'seven.png').read_bytes()))
    assert pixels.shape == (280, 280, 1)
    image = mnist_predict.normalise(drawing(7)).reshape(28, 28)
    assert (pixels[::10, ::10, 0] == np.round(image * 255)).all()


@pytest.mark.parametrize('flags, message', [
    (['--model_dir=none'], '--model_dir none: no checkpoint .*: python mnist_deep.py --model_dir'),
    (['--model_dir=other'], '--model_dir other: none of its checkpoints is whole'),
    (['--show=seven.png'], '--show seven.png: File exists'),
    (['--steps=3'], 'unrecognized arguments: --steps=3')])
def test_bad_flags_end_in_one_line(flags, message, folder, model, monkeypatch, capsys):
    (folder / 'other').mkdir(exist_ok=True)
    (folder / 'other' / 'checkpoint').write_text('model_checkpoint_path: "mnist_deep.ckpt-1"')
    (folder / 'other' / 'mnist_deep.ckpt-1.index').write_text('damaged')
    (folder / 'other' / 'mnist_deep.ckpt-1.data-00000-of-00001').write_text('damaged')
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', ['mnist_predict.py'])
    try:
        code = mnist_deep.run(lambda: mnist_predict.main(
            ['seven.png', '--model_dir', str(model), *flags]))
    except SystemExit as refused:  # by argparse
        code = refused.code
    output, errors = capsys.readouterr()
    line = errors.splitlines()[-1]
    assert code == 2
    assert re.search(f'mnist_predict.py: error: .*{message}', line) and output == ''


def test_takes_at_most_1100_megabytes_with_a_photograph_of_12_megapixels(model, camera, tmp_path):
    photo = 200 + 3 * np.random.RandomState(0).randn(3000, 4000, 1).repeat(3, axis=2)
    photo[1000:1900, 2500:3400] -= 150 * camera.enlarge(TEST.images[0], 900)[..., np.newaxis]
    with camera.session.graph.as_default():
        (tmp_path / 'photo.jpg').write_bytes(
            camera.session.run(camera.jpeg, {camera.picture: photo.astype(np.uint8)}))
    # Measured from a small process: a child's peak begins with what its parent has.
    result = python('-c', 'import resource, subprocess, sys\n'
                    f'subprocess.run([sys.executable, "mnist_predict.py", "{tmp_path}/photo.jpg",'
                    f' "--model_dir", "{model}"])\n'
                    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)')
    assert 'photo.jpg: ' in result.stdout
    kilobytes = int(result.stdout.splitlines()[-1])
    assert 200e3 < kilobytes < 1.1e6


def test_help_tells_how_to_use_it(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        mnist_predict.main(['--help'])
    output = capsys.readouterr().out
    for text in ('python mnist_deep.py --model_dir model', '--model_dir', '--show', 'PNG', '90 %'):
        assert text in output


def test_stands_on_the_network_and_the_loader_alone(folder, model, tmp_path):
    for name in ('mnist_predict.py', 'mnist_deep.py', 'model_dir.py', 'input_data.py'):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    result = subprocess.run([sys.executable, tmp_path / 'mnist_predict.py', folder / 'seven.png',
                             '--model_dir', model], capture_output=True, text=True, check=False,
                            cwd=tmp_path, env=ENVIRONMENT)
    assert (result.returncode, own_lines(result.stderr)) == (0, '')
    assert not [path for path in pathlib.Path(tmp_path).iterdir() if path.suffix == '.png']
