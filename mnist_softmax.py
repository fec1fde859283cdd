"""Softmax regression on MNIST, part one of TensorFlow 1.x's "Deep MNIST for Experts".

Builds the model as a static graph, trains it in a session by gradient descent, and prints its
accuracy on the test digits: about 0.92.
"""

import argparse
import contextlib
import os
import sys

import input_data

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # no notices; what fails is an exception
os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')  # a GPU's memory as it is needed
import tensorflow.compat.v1 as tf

tf.logging.set_verbosity(tf.logging.ERROR)  # no notices of deprecation: we mean TensorFlow 1.x
tf.disable_v2_behavior()


def train(flags):
    """Builds, trains and tests the model in the default graph: the tutorial's listing."""
    tf.set_random_seed(flags.seed)

    # Import data
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)

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

    # Closed in the end, so that a notebook's own session is the default again
    with contextlib.closing(tf.InteractiveSession()) as sess:
        sess.run(tf.global_variables_initializer())

        # Train
        for _ in range(flags.max_steps):
            batch = mnist.train.next_batch(flags.batch_size)
            train_step.run(feed_dict={x: batch[0], y_: batch[1]})

        # Test the trained model
        correct_prediction = tf.equal(tf.argmax(y, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))
        print('test accuracy %g' % accuracy.eval(
            feed_dict={x: mnist.test.images, y_: mnist.test.labels}))


# The tutorial ends here. The rest is for the command line.


def main(argv=None):
    """Runs the tutorial with a list of flags, the command line's if None.

    Raises:
        OSError, ValueError: the data cannot be used, or a flag is out of range.
        SystemExit: --help, or flags that argparse refuses.
    """
    flags = parse_flags(argv)
    with tf.Graph().as_default():  # a graph of its own: a notebook may call this again
        train(flags)


def parse_flags(argv):
    """The flags; their defaults are the tutorial's. ValueError: one is out of range."""
    parser = argparse.ArgumentParser(usage='%(prog)s [flags]', description=__doc__)
    here = os.path.dirname(os.path.realpath(__file__))
    parser.add_argument('--data_dir', metavar='FOLDER', default=os.path.join(here, 'MNIST_data'),
                        help='where the MNIST files are; missing ones are downloaded (default: '
                        '%(default)s)')
    parser.add_argument('--max_steps', metavar='N', type=int, default=1000,
                        help='number of training steps (default: %(default)s)')
    parser.add_argument('--batch_size', metavar='N', type=int, default=100,
                        help='number of examples in a step (default: %(default)s)')
    parser.add_argument('--learning_rate', metavar='RATE', type=float, default=0.5,
                        help='of gradient descent (default: %(default)s)')
    parser.add_argument('--seed', metavar='N', type=int,
                        help='a whole number that makes the run repeatable')
    flags = parser.parse_args(argv)
    for name in ('max_steps', 'batch_size', 'learning_rate'):
        if not 0 < getattr(flags, name) <= float(tf.float32.max):
            raise ValueError(f'argument --{name}: {getattr(flags, name)} is not a number above 0 '
                             'and in the range of float32')
    return flags


if __name__ == '__main__':
    try:
        main()
    except (OSError, ValueError) as error:
        print(f'mnist_softmax.py: error: {error}', file=sys.stderr)
        sys.exit(2)
