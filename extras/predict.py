"""Reads pictures of handwritten digits with the network of `mnist_deep.py`.

    sh setup.sh extras
    python mnist_deep.py --model_dir model
    python -m extras.predict photo1.png photo2.jpg --model_dir model

A picture shows one digit: dark on light or light on dark, anywhere in it. For
each one, a line gives the digit and its probability and, if that is below 90%,
a second guess. A picture that cannot be read is named on standard error; the
others are read all the same, and the exit code is 1.
"""

import argparse
import glob
import os
import sys
import warnings

import numpy as np

import mnist_deep
import model_dir
from extras.pictures import Image, normalise, open_picture, to_grey

tf = mnist_deep.tf


def main(argv=None):
    """Reads the pictures that argv or the command line names; returns the exit code.

    OSError, ValueError: --model_dir or --show is wrong.
    """
    flags = parse_flags(argv)
    warnings.simplefilter('ignore')  # Pillow's, about odd notes in a file
    with tf.Graph().as_default(), tf.Session() as sess:
        # The network, with the trained weights
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_conv, keep_prob = mnist_deep.deepnn(x)
        probabilities = tf.nn.softmax(y_conv)
        model_dir.restore_newest(flags.model_dir)

        failed = False
        for first in range(0, len(flags.pictures), 100):
            images, names = [], []
            for name in flags.pictures[first:first + 100]:
                seen = None
                try:
                    picture = open_picture(standard_input() if name == '-' else name)
                    seen = to_grey(picture)
                    seen = normalise(picture)
                    images.append(seen)
                    names.append(name)
                except (OSError, ValueError) as error:
                    failed = True
                    seen = getattr(error, 'image', seen)  # of several digits
                    print(f'{name}: {getattr(error, "strerror", None) or error}', file=sys.stderr)
                if flags.show and seen is not None:
                    show(seen, name, flags.show)
            if images:
                for name, row in zip(names, sess.run(probabilities, {x: images, keep_prob: 1.0})):
                    print(f'{name}: {answer(row)}', flush=True)
    return 1 if failed else 0


def answer(probabilities):
    """The likeliest class of a row of 10 and, if it has less than 90%, the next one, as text."""
    second, first = np.argsort(probabilities)[-2:]
    text = f'{first} ({probabilities[first]:.1%})'
    if probabilities[first] < 0.9:
        text += f', or {second} ({probabilities[second]:.1%})'
    return text


# The tutorial ends here. The rest is for files and flags.


def standard_input():
    """The binary standard input; OSError: it is closed."""
    if sys.stdin is None:
        raise OSError('standard input is closed')
    return sys.stdin.buffer


def show(seen, name, folder):
    """Writes what was seen of a picture into a folder, as PNG of at most 280x280 pixels.

    Args:
        seen: what the network sees, float32 [784]; or, where that is nothing, the Pillow image.
        name: the picture's. The file is name.png or, if there is one, name-2.png, name-3.png, ...
        folder: where to write; it is made if there is none.
    """
    if isinstance(seen, np.ndarray):
        pixels = np.round(seen.reshape(28, 28) * 255).astype(np.uint8)
        seen = Image.fromarray(pixels).resize((280, 280), Image.NEAREST)
    seen.thumbnail((280, 280))
    try:
        os.makedirs(folder, exist_ok=True)
        stem = 'stdin' if name == '-' else os.path.splitext(os.path.basename(name))[0]
        path, number = os.path.join(folder, f'{stem}.png'), 1
        while os.path.lexists(path):
            number += 1
            path = os.path.join(folder, f'{stem}-{number}.png')
        seen.save(path)
    except OSError as error:
        raise OSError(f'--show {folder}: {error.strerror or error}; name another folder') from None


def parse_flags(argv):
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        usage='python -m extras.predict [flags] PICTURE ...', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', nargs='+', metavar='PICTURE', type=os.path.expanduser,
                        help='a PNG, JPEG, GIF, BMP, WebP or TIFF file, or - for one on standard '
                        'input')
    parser.add_argument('--model_dir', default='model', metavar='FOLDER', type=os.path.expanduser,
                        help='folder of the trained network (default: %(default)s)')
    parser.add_argument('--show', metavar='FOLDER', type=os.path.expanduser,
                        help='also write to this folder what the network sees of each picture, at '
                        'ten times the size; a picture without a digit is written in grey; '
                        'existing files are kept')
    flags = parser.parse_intermixed_args(argv)
    # Where the shell has left '*.png' as it is, as on Windows, it stands for the files that match.
    flags.pictures = [match for name in flags.pictures for match in (
        [name] if os.path.exists(name) else sorted(glob.glob(name)) or [name])]
    return flags


if __name__ == '__main__':
    if sys.stdout:  # a name that it cannot show as it is
        sys.stdout.reconfigure(errors='backslashreplace')
    sys.exit(mnist_deep.run(main))
