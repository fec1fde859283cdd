"""Makes the pictures of README.md and docs: `python -m docs.make_pictures --model_dir model`.

digits.png: training digits as the loader gives them, ink dark.
weights.png: what softmax regression learns for each class, 0 to 9: blue speaks for it, red against.
digit.png: one test digit as a scanner would give it, dark on white, larger: a digit to read.
photographs.png: three of MNIST's digits on computed paper and three drawings, and below each what
    the network sees of it.
drawing.png: the page of extras.draw with a 6, leaning, that softmax regression takes for a 5.
learning.gif: the page in the first minute of a training, while a 3 lies on its paper.
    These two are made only with --model_dir, a trained network, and if there is a Chromium
    (Debian's packages chromium and chromium-driver).
"""

import argparse
import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from selenium.webdriver import ActionChains

import input_data
import mnist_softmax
from extras import pictures
from tests import browser, photographs

ROOT = pathlib.Path(__file__).resolve().parent.parent

DRAWING_SIZE = 1080, 1130  # pixels of drawing.png: wide enough for the page's three columns
LEARNING_SIZE = 1080, 680  # of learning.gif
LEARNING_STEPS = 0, 5, 10, 20, 30, 40, 50, 75, 100, 150, 200, 250, 300, 400, 500  # its pictures'

tf = mnist_softmax.tf


def tiles(images, columns, scale, background):
    """One picture of many: images [n, height, width, channels], in rows, each pixel a square."""
    images = np.pad(images, [(0, 0), (0, 2), (0, 2), (0, 0)], constant_values=background)
    n, height, width, channels = images.shape
    grid = images.reshape(n // columns, columns, height, width, channels)
    grid = grid.transpose(0, 2, 1, 3, 4).reshape(n // columns * height, columns * width, channels)
    return grid.repeat(scale, axis=0).repeat(scale, axis=1)


def learned_weights(mnist):
    """The weights [784, 10] that the tutorial's first part learns in its 1,000 steps."""
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_ = tf.placeholder(tf.float32, shape=[None, 10])
        W = tf.Variable(tf.zeros([784, 10]))
        b = tf.Variable(tf.zeros([10]))
        cross_entropy = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(
            labels=y_, logits=tf.matmul(x, W) + b))
        train_step = tf.train.GradientDescentOptimizer(0.5).minimize(cross_entropy)
        sess.run(tf.global_variables_initializer())
        for _ in range(1000):
            batch = mnist.train.next_batch(100)
            train_step.run(feed_dict={x: batch[0], y_: batch[1]})
        return W.eval()


def title(text):
    """A line of text, black on white, as a Pillow image 24 pixels high."""
    # Pillow's old font of pixels, which looks the same in all its versions
    font = getattr(ImageFont, 'load_default_imagefont', ImageFont.load_default)()
    line = Image.new('L', (6 * len(text), 12), 255)
    ImageDraw.Draw(line).text((0, 0), text, 0, font)
    return line.resize((2 * line.width, 2 * line.height), Image.NEAREST)


def weights_of_classes(mnist):
    """What softmax regression learns for each class, below its number."""
    weights = learned_weights(mnist).T.reshape(10, 28, 28)
    strength = np.clip(weights / np.abs(weights).max() * 1.5, -1, 1)[..., np.newaxis]
    red, blue = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.2, 0.8])
    colours = np.where(strength > 0, 1 - strength * (1 - blue), 1 + strength * (1 - red))
    sheet = Image.new('RGB', (120 * 5, 144 * 2), 'white')
    for number, image in enumerate(np.round(255 * colours).astype(np.uint8)):
        left, top = 120 * (number % 5), 144 * (number // 5)
        sheet.paste(title(str(number)), (left + 50, top))
        sheet.paste(Image.fromarray(image).resize((112, 112), Image.NEAREST), (left, top + 26))
    return np.asarray(sheet) / 255


def photographs_and_what_is_seen(mnist):
    """Pictures, 168 pixels wide and high, above the 28x28 pixels that are seen of them.

    Ink on paper, chalk on a board, a digit far in a corner; a thin pen, a thick one, a dark panel.
    """
    camera = photographs.Camera(seed=4)
    pages = [Image.fromarray(camera.paste(mnist.test.images[number], size, light_ink)[..., 0])
             for number, size, light_ink in ((1, 150, False), (2, 160, True), (4, 90, False))]
    pages += [photographs.drawn(9, pen=1), photographs.drawn(5, pen=40),
              ImageOps.expand(photographs.drawn(3, shades=(40, 230)), 40, fill=255)]
    sheet = Image.new('L', (174 * len(pages) - 6, 400), 255)
    sheet.paste(title('the picture'), (0, 0))
    sheet.paste(title('what the network sees'), (0, 204))
    for column, page in enumerate(pages):
        seen = np.round(pictures.normalise(page).reshape(28, 28) * 255).astype(np.uint8)
        small = ImageOps.pad(page, (168, 168), Image.BOX, color=page.getpixel((0, 0)))
        sheet.paste(small, (174 * column, 28))
        sheet.paste(Image.fromarray(seen).resize((168, 168), Image.NEAREST), (174 * column, 232))
    return np.asarray(sheet)[..., np.newaxis] / 255


@contextlib.contextmanager
def drawing_page(model_dir, size, folder='.'):
    """A Chromium of that size, which has the page of extras.draw open; it is run in the folder."""
    server = subprocess.Popen([sys.executable, '-m', 'extras.draw', '--model_dir', model_dir,
                               '--seed', '0', '--no_browser', '--port', '0'], cwd=folder,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)},
                              stdout=subprocess.PIPE, text=True)
    with server, tempfile.TemporaryDirectory() as profile:
        chromium = browser.start_chromium(profile)
        try:
            chromium.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
                'width': size[0], 'height': size[1], 'deviceScaleFactor': 1, 'mobile': False})
            chromium.get(server.stdout.readline())
            yield chromium
        finally:
            chromium.quit()
            server.terminate()


def write(chromium, digit, lean):
    """Writes a digit onto the page's paper; `lean` is by how much of its height, to the right."""
    paper = chromium.find_element('id', 'paper')
    side = paper.size['width']
    pen = ActionChains(chromium, duration=0)
    for stroke in photographs.STROKES[digit]:
        places = [(round(0.62 * side * (x - 0.5 + lean * (0.5 - y))),
                   round(0.75 * side * (y - 0.5))) for x, y in stroke]
        pen.move_to_element_with_offset(paper, *places[0]).click_and_hold()
        for place in places[1:]:
            pen.move_to_element_with_offset(paper, *place)
        pen.release()
    pen.perform()


def drawing(model_dir, path):
    """Saves what a Chromium shows of extras.draw's page when a 6 is drawn."""
    with drawing_page(model_dir, DRAWING_SIZE) as chromium:
        write(chromium, 6, lean=0.6)
        while chromium.execute_script('return asking || next'):
            time.sleep(0.1)
        time.sleep(1)  # until the bars have come to rest
        chromium.save_screenshot(str(path))


def learning(path):
    """Saves how the page changes while the networks learn, as an animated GIF."""
    with (tempfile.TemporaryDirectory() as empty,
          drawing_page('model', LEARNING_SIZE, empty) as chromium):
        write(chromium, 3, lean=0.2)
        frames, shown = [], -1
        while len(frames) < len(LEARNING_STEPS):
            line = chromium.find_element('id', 'training').text
            step = int(re.sub(r'\D', '', line.partition(' of ')[0]) or -1)
            if step > shown and step >= LEARNING_STEPS[len(frames)]:  # each shows something new
                shown = step
                shot = io.BytesIO(chromium.get_screenshot_as_png())
                frames.append(Image.open(shot).convert('RGB'))
            time.sleep(0.1)
    palette = Image.fromarray(np.concatenate([frames[0], frames[-1]])).quantize(64)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], loop=0, optimize=True,
                   duration=[700] * (len(frames) - 1) + [4000])


def main(folder=ROOT / 'docs', model_dir=None):
    """Writes the pictures into the folder; those of the page with the network in model_dir."""
    mnist = input_data.read_data_sets(ROOT / 'MNIST_data', one_hot=True, seed=0)
    digits = 1 - mnist.train.next_batch(48, shuffle=False)[0].reshape(48, 28, 28, 1)

    digit = 1 - mnist.test.next_batch(1, shuffle=False)[0].reshape(1, 28, 28, 1)

    with tf.Session() as sess:
        for name, picture in [('digits', tiles(digits, columns=12, scale=2, background=1)),
                              ('weights', weights_of_classes(mnist)),
                              ('digit', digit[0].repeat(4, axis=0).repeat(4, axis=1)),
                              ('photographs', photographs_and_what_is_seen(mnist))]:
            png = sess.run(tf.image.encode_png(np.round(picture * 255).astype(np.uint8)))
            (pathlib.Path(folder) / f'{name}.png').write_bytes(png)
    if model_dir and browser.CHROMIUM and browser.DRIVER:
        drawing(model_dir, pathlib.Path(folder) / 'drawing.png')
        learning(pathlib.Path(folder) / 'learning.gif')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--model_dir', metavar='FOLDER', help='of a trained network')
    main(**vars(parser.parse_args()))
