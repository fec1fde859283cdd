"""Photographs of handwritten digits, made from MNIST's test digits: on paper or board, anywhere in
the picture, in uneven light, with noise, as JPEG; and digits drawn by a round pen. For the tests,
the benchmarks and the pictures.
"""

import numpy as np
from PIL import Image, ImageDraw

import mnist_deep

tf = mnist_deep.tf


class Camera:
    """Makes photographs of digits; all that is left open is drawn at random.

    Args:
        seed: of everything drawn at random.
    """

    def __init__(self, seed):
        self.random = np.random.RandomState(seed)
        with tf.Graph().as_default():
            self.digit = tf.placeholder(tf.float32, [None, None])
            self.size = tf.placeholder(tf.int32, [2])
            self.enlarged = tf.image.resize(self.digit[..., tf.newaxis], self.size,
                                            method='bicubic')[..., 0]
            self.picture = tf.placeholder(tf.uint8, [None, None, None])
            self.jpeg = tf.image.encode_jpeg(self.picture, quality=50)
            self.decoded = tf.image.decode_jpeg(self.jpeg)
            self.png = tf.image.encode_png(self.picture)
            self.session = tf.Session()

    def enlarge(self, digit, size):
        """A digit, float32 [784] in [0, 1], in size x size pixels."""
        enlarged = self.session.run(self.enlarged, {
            self.digit: digit.reshape(28, 28), self.size: [size, size]})
        return np.clip(enlarged, 0, 1)

    def paste(self, digit, size, light_ink=None):
        """A photograph of a digit, uint8 [height, width, 1].

        Args:
            digit: float32 [784] in [0, 1], one of MNIST's.
            size: how many pixels its 28x28 become.
            light_ink: True for chalk on a board, False for ink on paper, None for either.
        """
        return self.on_paper(self.enlarge(digit, size), light_ink)

    def on_paper(self, drawing, light_ink=None):
        """A photograph of a drawing, float32 [height, width] in [0, 1], 1 is ink.

        The paper is 1.1 to 2.6 times as wide and high. The rest is as in `paste`.
        """
        random = self.random
        height, width = (int(side * random.uniform(1.1, 2.6)) for side in drawing.shape)
        ink = np.zeros([height, width], np.float32)
        top, left = (random.randint(page - side + 1)
                     for page, side in zip(ink.shape, drawing.shape))
        ink[top:top + drawing.shape[0], left:left + drawing.shape[1]] = drawing
        if light_ink is None:
            light_ink = random.rand() < 0.5

        # Light falls off across the paper; half of the pictures have a shadow over one side.
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, np.newaxis]
        x = np.linspace(-1, 1, width, dtype=np.float32)
        angle, fall = random.uniform(0, 2 * np.pi), random.uniform(0, 0.25)
        light = 1 - fall * (1 + x * np.cos(angle) + y * np.sin(angle)) / 2
        if random.rand() < 0.5:
            angle, edge = random.uniform(0, 2 * np.pi), random.uniform(-0.5, 0.8)
            distance = x * np.cos(angle) + y * np.sin(angle) - edge
            light *= 1 - random.uniform(0.1, 0.3) / (1 + np.exp(-distance / 0.1))

        paper, stroke = random.uniform(170, 245), random.uniform(10, 70)
        if light_ink:
            paper, stroke = random.uniform(20, 70), random.uniform(180, 245)
        picture = light * (paper + (stroke - paper) * ink)
        picture += random.uniform(1, 8) * random.randn(height, width)
        return np.clip(np.round(picture), 0, 255).astype(np.uint8)[..., np.newaxis]

    def photograph(self, digit, size, light_ink=None):
        """What `paste` makes as JPEG of quality 50, and decoded again: uint8 [height, width, 1]."""
        return self.as_jpeg(self.paste(digit, size, light_ink))

    def as_jpeg(self, picture):
        """A picture, uint8 [height, width, 1], as JPEG of quality 50, and decoded again."""
        return self.session.run(self.decoded, {self.picture: picture})


def arc(x, y, width, height, start, end):
    """Points along an ellipse, from one angle to another, in degrees; clockwise from the right."""
    angles = np.radians(np.linspace(start, end, 30))
    return [(x + width * np.cos(angle), y + height * np.sin(angle)) for angle in angles]


# How a pen goes for each digit, in a square from 0 to 1: strokes of points (x, y), y down.
STROKES = {
    0: [arc(0.5, 0.5, 0.3, 0.45, 0, 360)],
    1: [[(0.5, 0.05), (0.5, 0.95)]],
    2: [[*arc(0.5, 0.3, 0.28, 0.25, 180, 380), (0.2, 0.95), (0.82, 0.95)]],
    3: [arc(0.47, 0.28, 0.27, 0.23, 200, 450), arc(0.47, 0.72, 0.3, 0.23, 270, 520)],
    4: [[(0.55, 0.05), (0.18, 0.65), (0.85, 0.65)], [(0.68, 0.38), (0.68, 0.95)]],
    5: [[(0.78, 0.05), (0.28, 0.05), (0.25, 0.45), *arc(0.48, 0.67, 0.3, 0.28, 220, 510)]],
    6: [[*arc(0.75, 0.6, 0.5, 0.55, 270, 180), *arc(0.5, 0.7, 0.25, 0.25, 180, 540)]],
    7: [[(0.2, 0.05), (0.8, 0.05), (0.4, 0.95)]],
    8: [arc(0.5, 0.27, 0.22, 0.22, 0, 360), arc(0.5, 0.72, 0.28, 0.23, 0, 360)],
    9: [arc(0.5, 0.3, 0.25, 0.25, 0, 360), [(0.75, 0.3), (0.68, 0.95)]]}


def two_strokes(digit, apart):
    """A 0, 4, 5 or 9 as some write them: in two strokes, whose centre lines stay apart."""
    return {
        0: [arc(0.5 - apart / 2, 0.5, 0.28, 0.45, 90, 270),
            arc(0.5 + apart / 2, 0.5, 0.28, 0.45, 270, 450)],
        4: [[(0.2, 0.05), (0.2, 0.6), (0.72 - apart, 0.6)], [(0.72, 0.15), (0.72, 0.95)]],
        5: [[(0.25, 0.05), (0.25, 0.45), *arc(0.48, 0.67, 0.3, 0.28, 220, 510)],
            [(0.25 + apart, 0.05), (0.85, 0.05)]],
        9: [arc(0.42, 0.3, 0.22, 0.25, 0, 360), [(0.64 + apart, 0.05), (0.64 + apart, 0.95)]]
    }[digit]


def drawn(digit, pen=14, size=160, page=(200, 200), place=(20, 20), shades=(255, 0), gap=None):
    """A digit drawn by a round pen, as a Pillow image of grey levels.

    Args:
        digit: 0 to 9.
        pen: the pen's width, in pixels.
        size: the digit's height, in pixels.
        page: the page's width and height.
        place: the left and the top of the digit's square.
        shades: the paper's grey level and the ink's.
        gap: draws `two_strokes`, with so much paper between them, as a share of the pen's width.
    """
    strokes = STROKES[digit] if gap is None else two_strokes(digit, (1 + gap) * pen / (size - pen))
    image = Image.new('L', [4 * side for side in page], shades[0])  # four times: for smooth edges
    draw, radius = ImageDraw.Draw(image), 2 * pen
    for stroke in strokes:
        points = [tuple(4 * (start + pen / 2 + (size - pen) * share)
                        for start, share in zip(place, point)) for point in stroke]
        draw.line(points, shades[1], round(4 * pen))
        for x, y in points:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), shades[1])
    return image.resize(page, Image.BOX)
