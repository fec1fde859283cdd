"""A convolutional network for MNIST, part two of TensorFlow 1.x's "Deep MNIST for Experts".

Builds the network as a static graph, trains it in a session, and prints its accuracy on the test
digits: about 0.992.
"""

import argparse
import contextlib
import os
import signal
import sys
import time

import input_data

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # no notices; what fails is an exception
os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')  # a GPU's memory as it is needed
import tensorflow.compat.v1 as tf

tf.logging.set_verbosity(tf.logging.ERROR)  # no notices of deprecation: we mean TensorFlow 1.x
tf.disable_v2_behavior()


def deepnn(x):
    """Builds the graph of a network that tells handwritten digits apart.

    Args:
        x: float32 tensor [n, 784], the pixels of n images of 28x28, in [0, 1].

    Returns:
        y_conv: float32 tensor [n, 10], how much each image looks like a 0, ..., a 9 (logits).
        keep_prob: scalar placeholder, the probability with which dropout keeps a neuron.
    """
    # Images as a convolution wants them: [n, height, width, channels], with one channel for grey.
    with tf.name_scope('reshape'):
        x_image = tf.reshape(x, [-1, 28, 28, 1])

    # The first layer finds 32 features in each 5x5 patch: [n, 28, 28, 32].
    with tf.name_scope('conv1'):
        W_conv1 = weight_variable([5, 5, 1, 32])
        b_conv1 = bias_variable([32])
        h_conv1 = tf.nn.relu(conv2d(x_image, W_conv1) + b_conv1)

    # Pooling keeps the largest of each 2x2 block: [n, 14, 14, 32].
    with tf.name_scope('pool1'):
        h_pool1 = max_pool_2x2(h_conv1)

    # The second layer finds 64 features of these 32: [n, 14, 14, 64].
    with tf.name_scope('conv2'):
        W_conv2 = weight_variable([5, 5, 32, 64])
        b_conv2 = bias_variable([64])
        h_conv2 = tf.nn.relu(conv2d(h_pool1, W_conv2) + b_conv2)

    # [n, 7, 7, 64].
    with tf.name_scope('pool2'):
        h_pool2 = max_pool_2x2(h_conv2)

    # 1024 neurons, each connected to all of that, so that they see the image as a whole.
    with tf.name_scope('fc1'):
        W_fc1 = weight_variable([7 * 7 * 64, 1024])
        b_fc1 = bias_variable([1024])
        h_pool2_flat = tf.reshape(h_pool2, [-1, 7 * 7 * 64])
        h_fc1 = tf.nn.relu(tf.matmul(h_pool2_flat, W_fc1) + b_fc1)

    # Neurons left out at random in training cannot rely on each other: less overfitting.
    with tf.name_scope('dropout'):
        keep_prob = tf.placeholder(tf.float32, name='keep_prob')
        h_fc1_drop = tf.nn.dropout(h_fc1, keep_prob)

    # The readout: 1024 features to 10 classes.
    with tf.name_scope('fc2'):
        W_fc2 = weight_variable([1024, 10])
        b_fc2 = bias_variable([10])
        y_conv = tf.matmul(h_fc1_drop, W_fc2) + b_fc2
    return y_conv, keep_prob


def conv2d(x, W):
    """Convolves x [n, height, width, in] with W [5, 5, in, out], at every pixel: same size."""
    return tf.nn.conv2d(x, W, strides=[1, 1, 1, 1], padding='SAME')


def max_pool_2x2(x):
    """Halves the height and width of x [n, height, width, channels]."""
    return tf.nn.max_pool(x, ksize=[1, 2, 2, 1], strides=[1, 2, 2, 1], padding='SAME')


def weight_variable(shape):
    """Weights with a little noise, so that no two neurons start alike."""
    initial = tf.truncated_normal(shape, stddev=0.1)
    return tf.Variable(initial)


def bias_variable(shape):
    """Biases just above 0, so that no ReLU starts dead."""
    initial = tf.constant(0.1, shape=shape)
    return tf.Variable(initial)


def train(flags):
    """Builds, trains and tests the network in the default graph: the tutorial's listing."""
    tf.set_random_seed(flags.seed)

    # Import data
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)

    # Create the model
    x = tf.placeholder(tf.float32, shape=[None, 784], name='x')
    y_ = tf.placeholder(tf.float32, shape=[None, 10], name='y_')
    y_conv, keep_prob = deepnn(x)

    # Define loss and optimizer
    with tf.name_scope('loss'):
        cross_entropy = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv))

    with tf.name_scope('adam_optimizer'):
        train_step = tf.train.AdamOptimizer(flags.learning_rate).minimize(
            cross_entropy, global_step=tf.train.get_or_create_global_step())  # for --model_dir

    with tf.name_scope('accuracy'):
        correct_prediction = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))

    with tf.Session(config=session_config(flags.bfloat16)) as sess, kept_in(flags) as kept:
        sess.run(tf.global_variables_initializer())
        steps = range(flags.max_steps)
        if kept:  # with --model_dir: from its last checkpoint on, with a log for TensorBoard
            steps = kept.resume(mnist.train)
            accuracy = kept.events.logged(accuracy, cross_entropy)

        # Train
        for i in progress(steps, flags.max_steps):
            batch = mnist.train.next_batch(flags.batch_size)
            if i % 100 == 0:
                train_accuracy = accuracy.eval(feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 1.0})
                print('step %d, training accuracy %g' % (i, train_accuracy), flush=True)
            train_step.run(feed_dict={x: batch[0], y_: batch[1], keep_prob: 0.5})

        # Test the trained network, a few images at a time
        correct = 0
        for images, labels in in_batches(mnist.test):
            correct += correct_prediction.eval(feed_dict={
                x: images, y_: labels, keep_prob: 1.0}).sum()
        print('test accuracy %g' % (correct / mnist.test.num_examples), flush=True)
        if kept:
            kept.events.write_mistakes(in_batches(mnist.test), x, y_, keep_prob, y_conv)


# The tutorial ends here. The rest is for the command line: test images in batches, the progress
# line, --bfloat16 and the other flags. What --model_dir adds is in model_dir.py.


def main(argv=None):
    """Runs the tutorial with a list of flags, the command line's if None.

    Raises:
        OSError, ValueError: the data or --model_dir cannot be used, or a flag is out of range.
        KeyboardInterrupt: with --model_dir, a signal ended the training; it says what is kept.
        SystemExit: --help, or flags that argparse refuses.
    """
    flags = checked(flag_parser(__doc__).parse_args(argv))
    with tf.Graph().as_default():  # a graph of its own: a notebook may call this again
        train(flags)


def in_batches(data_set, size=200):
    """Yields all examples once, a few at a time.

    The first layer's output for all 10,000 test images at once would take a gigabyte.
    """
    for first in range(0, data_set.num_examples, size):
        yield data_set.next_batch(min(size, data_set.num_examples - first), shuffle=False)


def progress(steps, end):
    """Yields the steps; a terminal shows, on standard error, their speed and the time left."""
    on_terminal = sys.stderr and sys.stderr.isatty()  # None: it was closed
    began = shown = time.monotonic()
    try:
        for done, step in enumerate(steps, 1):
            yield step
            now = time.monotonic()
            if on_terminal and now > shown + 0.5:
                shown, speed = now, done / (now - began)
                minutes, seconds = divmod(round((end - step - 1) / speed), 60)
                line = f'{speed:.0f} steps/s, {minutes}:{seconds:02d} left'
                print(f'\r{line:30}\r', end='', file=sys.stderr, flush=True)
    finally:
        if shown > began:
            print(f'\r{"":30}\r', end='', file=sys.stderr, flush=True)


def kept_in(flags):
    """The context of a training: its ModelDir with --model_dir, None without that flag."""
    if flags.model_dir is None:
        return contextlib.nullcontext()
    from model_dir import ModelDir  # which nothing else needs
    return ModelDir(flags)


def session_config(bfloat16):
    """The session's settings; bfloat16: whether to compute in it, if the CPU can."""
    config = tf.ConfigProto()
    if bfloat16 and computes_in_bfloat16():
        # TensorFlow then casts the inputs of convolutions and matrix products, and no variables.
        rewrites = config.graph_options.rewrite_options
        rewrites.auto_mixed_precision_onednn_bfloat16 = rewrites.ON
    elif bfloat16:
        print('--bfloat16: this CPU could only emulate it, slowly; training in float32',
              file=sys.stderr)
    return config


def computes_in_bfloat16():
    """Whether the CPU has bfloat16 instructions. TensorFlow doesn't tell; Linux does."""
    try:
        with open('/proc/cpuinfo') as cpuinfo:
            return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(cpuinfo.read().split())
    except OSError:
        return False


def flag_parser(description):
    """The parser of this script's flags, to which others can be added."""
    parser = argparse.ArgumentParser(usage='%(prog)s [flags]', description=description)
    here = os.path.dirname(os.path.realpath(__file__))
    parser.add_argument('--data_dir', metavar='FOLDER', default=os.path.join(here, 'MNIST_data'),
                        help='where the MNIST files are; missing ones are downloaded (default: '
                        '%(default)s)')
    parser.add_argument('--max_steps', metavar='N', type=int, default=20000,
                        help='number of training steps (default: %(default)s)')
    parser.add_argument('--batch_size', metavar='N', type=int, default=50,
                        help='number of examples in a step (default: %(default)s)')
    parser.add_argument('--learning_rate', metavar='RATE', type=float, default=1e-4,
                        help='of the Adam optimizer (default: %(default)s)')
    parser.add_argument('--seed', metavar='N', type=int,
                        help='a whole number that makes the run repeatable')
    parser.add_argument('--model_dir', metavar='FOLDER', type=os.path.expanduser,
                        help='folder to keep the network in and to resume from; what '
                        'TensorBoard shows goes there, too; default: nothing is kept')
    parser.add_argument('--save_checkpoints_steps', metavar='N', type=int, default=1000,
                        help='training steps from one checkpoint to the next (default: '
                        '%(default)s)')
    parser.add_argument('--bfloat16', action='store_true',
                        help='compute in bfloat16, about 1.5 times as fast, if the CPU can')
    return parser


def checked(flags):
    """The parsed flags; ValueError: a number is out of range."""
    for name in ('max_steps', 'batch_size', 'learning_rate', 'save_checkpoints_steps'):
        if not 0 < getattr(flags, name) <= float(tf.float32.max):
            raise ValueError(f'argument --{name}: {getattr(flags, name)} is not a number above 0 '
                             'and in the range of float32')
    return flags


def run(main):
    """Runs a script's main, and turns its exceptions into one line; returns the exit code."""
    sys.stderr = sys.stderr or open(os.devnull, 'w')  # noqa: SIM115 (None: it was closed)
    try:
        return main()
    except KeyboardInterrupt as stopped:  # model_dir.Stopped has an exit code
        print(str(stopped) or 'stopped', file=sys.stderr)
        return getattr(stopped, 'exit_code', 130)
    except (OSError, ValueError) as error:
        print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr)
        if isinstance(error, BrokenPipeError):  # or Python fails once more, writing it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 2


if __name__ == '__main__':
    # Ctrl-C ends this process as it ends any C program. The exception of Python's own handler, if
    # it comes while TensorFlow goes through a feed_dict, is a segmentation fault, or is lost.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(run(main))
