"""Softmax regression on MNIST, part one of TensorFlow 1.x's "Deep MNIST for Experts".

Builds the model as a static graph, trains it in a session by gradient descent, and prints its
accuracy on the test digits: about 0.92.
"""

import argparse
import math
import os
import signal
import sys
import time

import input_data

# TensorFlow writes to file descriptor 2 while it loads, at any log level: keep that off the screen.
screen = os.dup(2)
if os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3') != '0':
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import tensorflow.compat.v1 as tf
finally:
    os.dup2(screen, 2)
os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')  # a GPU's memory as it is needed
tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()


def main(argv=None):
    """Trains and evaluates the model; `argv` are the command line's flags, sys.argv's if None."""
    parser, flags = parse_flags(argv)

    # Import data
    mnist = read_data(parser, flags)

    # Create the model
    x = tf.placeholder(tf.float32, shape=[None, 784])
    W = tf.Variable(tf.zeros([784, 10]))
    b = tf.Variable(tf.zeros([10]))
    y = tf.matmul(x, W) + b

    # Define loss and optimizer
    y_ = tf.placeholder(tf.float32, shape=[None, 10])

    # -sum(y_ * log(softmax(y))), written out, is not a number as soon as a softmax underflows to 0.
    # The op that takes the raw y is stable.
    cross_entropy = tf.reduce_mean(
        tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y))
    train_step = tf.train.GradientDescentOptimizer(flags.learning_rate).minimize(cross_entropy)

    sess = tf.InteractiveSession()
    sess.run(tf.global_variables_initializer())

    # Train
    for _ in progress(range(flags.max_steps)):
        batch = mnist.train.next_batch(flags.batch_size)
        train_step.run(feed_dict={x: batch[0], y_: batch[1]})

    # Test the trained model
    correct_prediction = tf.equal(tf.argmax(y, 1), tf.argmax(y_, 1))
    accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))
    print('test accuracy %g' % accuracy.eval(
        feed_dict={x: mnist.test.images, y_: mnist.test.labels}))
    sess.close()


# The tutorial ends here. The rest is for the command line: the progress line, Ctrl-C and the flags.


def progress(steps, name='step'):
    """Yields the steps; on a terminal, standard error shows their speed and the time left.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; it says at which step. It waits until the step is
            done: in the middle of a session's run it can crash TensorFlow.
    """
    pressed, usual = [], signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:  # a background job ignores Ctrl-C, and should go on doing so
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    began = shown = time.monotonic()
    try:
        for done, step in enumerate(steps, 1):
            yield step
            if pressed:
                raise KeyboardInterrupt(f'stopped at {name} {step + 1}')
            now = time.monotonic()
            if now > shown + 0.5 and sys.stderr.isatty():
                shown, speed = now, done / (now - began)
                left = round((len(steps) - done) / speed)
                line = f'{speed:.0f} steps/s, {left // 60}:{left % 60:02d} left'
                print(f'\r{line:30}\r', end='', file=sys.stderr, flush=True)
    finally:
        if shown > began:
            print(f'\r{"":30}\r', end='', file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, usual)


def parse_flags(argv):
    """Returns the parser, for its one-line errors, and the flags."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument('--data_dir', default=os.path.join(here, 'MNIST_data'),
                        help='folder of the MNIST files; those missing are downloaded')
    parser.add_argument('--max_steps', type=int, default=1000, help='number of training steps')
    parser.add_argument('--batch_size', type=int, default=100, help='number of examples in a step')
    parser.add_argument('--learning_rate', type=float, default=0.5, help='size of a descent step')
    parser.add_argument('--seed', type=int, help='whole number: the same one gives the same run')
    flags = parser.parse_args(argv)
    for name in ('max_steps', 'batch_size', 'learning_rate'):
        if not 0 < getattr(flags, name) < math.inf:
            parser.error(f'argument --{name}: {getattr(flags, name)} is not a number above 0')
    return parser, flags


def read_data(parser, flags):
    """MNIST from `input_data.read_data_sets`; what is wrong with it is said as argparse does."""
    try:
        mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)
        pixels = mnist.validation.next_batch(1)[0].size
        if pixels != 784:
            raise ValueError(f'images of {pixels} pixels, expected 28x28')
    except (OSError, ValueError) as error:
        parser.error(f'--data_dir {flags.data_dir}, or --seed: {error}')
    return mnist


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt as stopped:
        print(str(stopped) or 'stopped', file=sys.stderr)
        sys.exit(130)
