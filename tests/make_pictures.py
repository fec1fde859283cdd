"""Makes the README's pictures: `python tests/make_pictures.py`, or with a folder other than docs.

digits.png: training digits as the loader gives them, ink dark.
weights.png: what softmax regression learns for each class, 0 to 9: blue speaks for it, red against.
digit.png: one test digit as a scanner would give it, dark on white, larger: a digit to read.
photographs.png: three photographs of digits, and below each what the network sees of it.
"""

import pathlib
import sys

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import photographs  # noqa: E402

import input_data  # noqa: E402 (the path comes first)
import mnist_predict  # noqa: E402
import mnist_softmax  # noqa: E402

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


def photographs_and_what_is_seen(mnist):
    """Ink on paper, chalk on a board and a digit far in a corner, above 28x28 pixels of each."""
    camera = photographs.Camera(seed=4)
    columns = []
    for number, size, light_ink in ((1, 150, False), (2, 160, True), (4, 90, False)):
        page = camera.paste(mnist.test.images[number], size, light_ink)
        seen = np.round(mnist_predict.normalise(page).reshape(28, 28, 1) * 255)
        height, width = (168 * side // max(page.shape) for side in page.shape[:2])
        page = np.asarray(Image.fromarray(page[..., 0]).resize((width, height), Image.BOX))
        page = page[..., np.newaxis]
        border = [(0, 168 - page.shape[0]), (0, 168 - page.shape[1]), (0, 0)]
        columns.append(np.concatenate([np.pad(page, border, constant_values=255),
                                       np.full([6, 168, 1], 255),
                                       seen.repeat(6, axis=0).repeat(6, axis=1)]))
        columns.append(np.full([len(columns[0]), 6, 1], 255))
    return np.concatenate(columns[:-1], axis=1) / 255


def main(folder=ROOT / 'docs'):
    """Writes the pictures into the folder."""
    mnist = input_data.read_data_sets(ROOT / 'MNIST_data', one_hot=True, seed=0)
    digits = 1 - mnist.train.next_batch(48, shuffle=False)[0].reshape(48, 28, 28, 1)

    weights = learned_weights(mnist).T.reshape(10, 28, 28)
    strength = np.clip(weights / np.abs(weights).max() * 1.5, -1, 1)[..., np.newaxis]
    red, blue = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.2, 0.8])
    colours = np.where(strength > 0, 1 - strength * (1 - blue), 1 + strength * (1 - red))

    digit = 1 - mnist.test.next_batch(1, shuffle=False)[0].reshape(1, 28, 28, 1)

    with tf.Session() as sess:
        for name, picture in [('digits', tiles(digits, columns=12, scale=2, background=1)),
                              ('weights', tiles(colours, columns=5, scale=4, background=1)),
                              ('digit', digit[0].repeat(4, axis=0).repeat(4, axis=1)),
                              ('photographs', photographs_and_what_is_seen(mnist))]:
            png = sess.run(tf.image.encode_png(np.round(picture * 255).astype(np.uint8)))
            (pathlib.Path(folder) / f'{name}.png').write_bytes(png)


if __name__ == '__main__':
    main(*sys.argv[1:])
