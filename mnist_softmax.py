"""Softmax regression on MNIST, part one of TensorFlow 1.x's "Deep MNIST for Experts".

Builds the model as a static graph, trains it in a session by gradient descent, and prints its
accuracy on the test digits: about 0.92.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
import time


def stop(step):
    """Ends the program as Ctrl-C should: with one line and exit code 130."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # once is enough
    print(f'stopped at step {step}', file=sys.stderr)
    sys.exit(130)


@contextlib.contextmanager
def quiet_start():
    """Keeps TensorFlow's greetings off the screen, unless TF_CPP_MIN_LOG_LEVEL asks for them."""
    screen = os.dup(2)  # C++ knows standard error by its number, and greets before levels count
    if os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3') != '0':
        with open(os.devnull, 'w') as nowhere:
            os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except KeyboardInterrupt:
        os.dup2(screen, 2)
        stop(0)
    finally:
        os.dup2(screen, 2)
        os.close(screen)


with quiet_start():
    import input_data
    import tensorflow.compat.v1 as tf
tf.logging.set_verbosity(tf.logging.ERROR)
tf.disable_v2_behavior()


def main(argv=None):
    """Trains and evaluates the model; `argv` are the command line's flags, sys.argv's if None."""
    parser, flags = parse_flags(argv)
    if flags.seed is not None:
        tf.set_random_seed(flags.seed)
        os.environ['TF_DETERMINISTIC_OPS'] = '1'  # sums in one order on a GPU, too

    # Import data
    try:
        mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)
        pixels = mnist.validation.next_batch(1)[0].size
        if pixels != 784:
            raise ValueError(f'images of {pixels} pixels, expected MNIST\'s 28x28')
    except (OSError, ValueError) as error:
        parser.error(f'--data_dir {flags.data_dir}, or --seed: {error}')

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

    # Test the model: the share of examples whose largest y is that of their class
    correct_prediction = tf.equal(tf.argmax(y, 1), tf.argmax(y_, 1))
    accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))

    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True  # a GPU's memory as it is needed, not all of it
    sess = tf.InteractiveSession(config=config)
    sess.run(tf.global_variables_initializer())
    with ctrl_c_held_back() as ctrl_c:
        # Train
        for i in progress(range(flags.max_steps)):
            batch = mnist.train.next_batch(flags.batch_size)
            train_step.run(feed_dict={x: batch[0], y_: batch[1]})
            if ctrl_c:
                break
        if ctrl_c:
            stop(i + 1)

        # Test the trained model
        print('test accuracy %g' % accuracy.eval(
            feed_dict={x: mnist.test.images, y_: mnist.test.labels}))
    sess.close()


def progress(steps):
    """Yields the steps; on a terminal, standard error shows their speed and the time left."""
    def show(line):  # and put the cursor back, so that what is printed next takes its place
        if sys.stderr.isatty():
            print(f'\r{line:30}\r', end='', file=sys.stderr, flush=True)

    began = shown = time.monotonic()
    try:
        for done, step in enumerate(steps, 1):
            yield step
            now = time.monotonic()
            if now > shown + 0.5:
                shown, speed = now, done / (now - began)
                left = round((len(steps) - done) / speed)
                show(f'{speed:.0f} steps/s, {left // 60}:{left % 60:02d} left')
    finally:
        show('')


@contextlib.contextmanager
def ctrl_c_held_back():
    """Yields a list that is empty until Ctrl-C is pressed: a session's run must not be cut short.

    A KeyboardInterrupt in the middle of one can leave the session locked, or crash.
    """
    pressed = []
    usual = signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:  # which is what background jobs do
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, usual)


def parse_flags(argv):
    """Returns the parser, for its one-line errors, and the flags."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--data_dir', default=os.path.join(
        os.path.dirname(os.path.abspath(__file__)), 'MNIST_data'),
                        help='folder of the MNIST files; those missing are downloaded')
    parser.add_argument('--max_steps', type=int, default=1000,
                        help='number of training steps')
    parser.add_argument('--batch_size', type=int, default=100,
                        help='number of examples in a step')
    parser.add_argument('--learning_rate', type=float, default=0.5,
                        help='length of a gradient descent step')
    parser.add_argument('--seed', type=int,
                        help='whole number from 0 on: runs with the same seed are the same')
    flags = parser.parse_args(argv)
    for name in ('max_steps', 'batch_size', 'learning_rate'):
        if not 0 < getattr(flags, name) < math.inf:
            parser.error(f'argument --{name}: {getattr(flags, name)} is not a number above 0')
    return parser, flags


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        stop(0)
