"""A convolutional network for MNIST, part two of TensorFlow 1.x's "Deep MNIST for Experts".

Builds the network as a static graph, trains it in a session, and prints its accuracy on the test
digits: about 0.992.
"""

import argparse
import glob
import math
import os
import signal
import sys
import tempfile
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
        keep_prob = tf.placeholder(tf.float32)
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


def main(argv=None):
    """Trains and evaluates the network; `argv` are the command line's flags, sys.argv's if None."""
    parser, flags = parse_flags(argv)
    set_seed(flags.seed)

    # Import data
    mnist = read_data(parser, flags)

    # Create the model
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_ = tf.placeholder(tf.float32, shape=[None, 10])
    y_conv, keep_prob = deepnn(x)

    # Define loss and optimizer
    with tf.name_scope('loss'):
        cross_entropy = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv))

    with tf.name_scope('adam_optimizer'):
        train_step = tf.train.AdamOptimizer(flags.learning_rate).minimize(
            cross_entropy, global_step=tf.train.get_or_create_global_step())

    with tf.name_scope('accuracy'):
        correct_prediction = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))

    # What --model_dir adds: it resumes, saves, and writes for TensorBoard. You can skip its lines.
    model_dir = ModelDir(parser, flags, cross_entropy, accuracy)

    with tf.Session(config=session_config(flags.bfloat16)) as sess:
        sess.run(tf.global_variables_initializer())

        # Train
        for i in model_dir.steps(mnist.train):
            batch = mnist.train.next_batch(flags.batch_size)
            if i % 100 == 0:
                train_accuracy, summary = sess.run([accuracy, model_dir.summary], feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 1.0})
                print('step %d, training accuracy %g' % (i, train_accuracy), flush=True)
                model_dir.add_summary(summary, i)
            train_step.run(feed_dict={x: batch[0], y_: batch[1], keep_prob: 0.5})

        # Test the trained network
        correct = 0
        for images, labels in in_batches(mnist.test):
            correct += correct_prediction.eval(feed_dict={
                x: images, y_: labels, keep_prob: 1.0}).sum()
        print('test accuracy %g' % (correct / mnist.test.num_examples))
        model_dir.write_mistakes(mnist.test, x, y_, keep_prob, y_conv)


# The tutorial ends here. The rest is for the command line: test images in batches, the progress
# line and Ctrl-C, then --model_dir, --bfloat16 and the other flags.


def in_batches(data_set, size=200):
    """Yields all examples once, a few at a time.

    The first layer's output for all 10,000 test images at once would take a gigabyte.
    """
    for i in progress(range(math.ceil(data_set.num_examples / size)), 'test batch'):
        rest = data_set.num_examples - i * size
        yield data_set.next_batch(min(size, rest), shuffle=False)


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


CHECKPOINT = 'mnist_deep.ckpt'  # what the checkpoints' file names begin with


class ModelDir:
    """What --model_dir adds to the training: checkpoints to resume from, and TensorBoard's events.

    Without the flag, nothing is read and nothing is written.

    Args:
        parser, flags: of the command line; what is wrong with the folder is said as argparse does.
        cross_entropy, accuracy: scalar tensors, to be shown in TensorBoard.

    Attributes:
        summary: string tensor, to be fetched together with the accuracy and given to `add_summary`.
    """

    def __init__(self, parser, flags, cross_entropy, accuracy):
        self.parser, self.flags, self.folder = parser, flags, flags.model_dir
        self.saver = tf.train.Saver(max_to_keep=2, save_relative_paths=True)
        self.summary = training_summaries(cross_entropy, accuracy)
        self.writer = None

    def steps(self, train):
        """Yields the numbers of the steps still to be done, and saves after those where it is due.

        Args:
            train: the training set. With --seed, its order goes on where the earlier runs left it.
        """
        start, end = 0, self.flags.max_steps
        if self.folder:
            try:
                start = self.restore()
            except (OSError, ValueError) as error:
                self.parser.error(f'--model_dir {self.folder}: {error}')
        if start:
            print(f'going on from step {start} of {end}', file=sys.stderr)
        if start and start < end and self.flags.seed is not None:
            draw_again(start, train, self.flags.batch_size)
        if self.folder and start < end:
            self.writer = tf.summary.FileWriter(self.folder, tf.get_default_graph(),
                                                filename_suffix=f'.from_step_{start}')
            # TensorBoard then forgets the later steps of a run that was killed.
            self.writer.add_session_log(tf.SessionLog(status=tf.SessionLog.START), start)

        try:
            for i in progress(range(start, end)):
                yield i
                if (i + 1) % self.flags.save_checkpoints_steps == 0 or i + 1 == end:
                    self.save()
        except KeyboardInterrupt as stopped:
            if not self.folder:
                raise
            usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing may stop this
            self.save()
            signal.signal(signal.SIGINT, usual)
            raise KeyboardInterrupt(f'{stopped}, kept in {self.folder}') from None

    def restore(self):
        """Restores the newest checkpoint, if there is one; returns its number of steps, or 0."""
        state = find_checkpoint(self.folder, {v.op.name: v for v in tf.global_variables()})
        if state is None:
            return 0
        self.saver.restore(tf.get_default_session(), state.model_checkpoint_path)
        self.saver.recover_last_checkpoints(state.all_model_checkpoint_paths)
        # A run that was killed while it saved leaves its temporary files.
        for left in glob.glob(f'{glob.escape(self.folder)}/{CHECKPOINT}*.tempstate*'):
            os.remove(left)
        return tf.train.get_global_step().eval()

    def save(self):
        """Saves a checkpoint, if there is a folder, and what was written for TensorBoard so far."""
        if self.folder:
            self.saver.save(
                tf.get_default_session(), os.path.join(self.folder, CHECKPOINT),
                tf.train.get_global_step(), write_meta_graph=False)
            self.writer.flush()

    def add_summary(self, summary, step):
        """Writes, for TensorBoard, what was fetched from `summary` before a step."""
        if self.writer:
            self.writer.add_summary(summary, step)

    def write_mistakes(self, data_set, x, y_, keep_prob, y_conv):
        """Writes, for TensorBoard, the images that the trained network gets wrong, each as
        mistakes/CLASS_taken_for_PREDICTION. The tensors are those of the tutorial.
        """
        if not self.writer:
            return
        predictions, classes = tf.argmax(y_conv, 1), tf.argmax(y_, 1)
        wrong = tf.where(tf.not_equal(predictions, classes))[:, 0]
        pixels = tf.reshape(tf.gather(x, wrong), [-1, 28, 28, 1])
        pictures = tf.map_fn(tf.image.encode_png, tf.cast(tf.round(pixels * 255), tf.uint8),
                             fn_output_signature=tf.string)
        mistakes = [wrong, tf.gather(classes, wrong), tf.gather(predictions, wrong), pictures]
        start = 0
        for images, labels in in_batches(data_set):
            found = tf.get_default_session().run(mistakes, {x: images, y_: labels, keep_prob: 1.0})
            for number, label, prediction, picture in zip(*found):
                self.writer.add_summary(tf.Summary(value=[tf.Summary.Value(
                    tag=f'mistakes/{label}_taken_for_{prediction}/test_image_{start + number}',
                    image=tf.Summary.Image(height=28, width=28, colorspace=1,
                                           encoded_image_string=picture))]))
            start += len(images)
        self.writer.close()


def find_checkpoint(folder, variables):
    """Looks for checkpoints in a folder, which is made if need be.

    Args:
        folder: its path.
        variables: dict, name in the checkpoint -> variable, of all that a checkpoint should have.

    Returns:
        TensorFlow's CheckpointState, with the paths of the checkpoints; None for a new folder.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: it holds something else than this network.
    """
    os.makedirs(folder, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # raises if nothing can be written
    state = tf.train.get_checkpoint_state(folder)
    if state is None:
        ours = (CHECKPOINT, 'checkpoint.tmp', 'events.out.tfevents')
        others = [name for name in sorted(os.listdir(folder)) if not name.startswith(ours)]
        if others:
            raise ValueError(f'it holds {others[0]}, and no checkpoint of this network; '
                             'name a new folder')
        return None
    try:
        found = tf.train.load_checkpoint(state.model_checkpoint_path).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise ValueError(f'its checkpoint cannot be read ({error}); name a new folder') from error
    if found != {name: variable.shape.as_list() for name, variable in variables.items()}:
        raise ValueError('its checkpoint is of another model; name a new folder')
    return state


def draw_again(steps, train, batch_size):
    """Draws the random numbers of the first steps once more, so that the next ones are next.

    In each process, the order of the minibatches and dropout begin anew from the seed. Dropout
    draws [batch_size, 1024] numbers each time the network runs: in each training step and, every
    100 steps, for the training accuracy. Only its random operation is run here, for ten steps at a
    time: that takes the generator as far as ten runs do.
    """
    dropout = next(op for op in tf.get_default_graph().get_operations()
                   if op.type == 'RandomUniform' and op.name.startswith('dropout/'))
    shape, = dropout.inputs
    for ten in progress(range(math.ceil(steps / 10)), 'repeated draw'):
        batches = min(10, steps - 10 * ten)
        for _ in range(batches):
            train.next_batch(batch_size)
        runs = batches + 1 if ten % 10 == 0 else batches
        dropout.run(feed_dict={shape: [runs * batch_size, 1024]})


def training_summaries(cross_entropy, accuracy):
    """What TensorBoard shows of the training: two curves, and what the first layer learned."""
    W_conv1 = tf.trainable_variables('conv1')[0]
    with tf.name_scope('filters'):  # 4 rows of 8, 5x5 pixels each and 1 between them
        tiles = tf.pad(tf.reshape(W_conv1, [5, 5, 4, 8]), [[0, 1], [0, 1], [0, 0], [0, 0]])
        grid = tf.reshape(tf.transpose(tiles, [2, 0, 3, 1]), [1, 4 * 6, 8 * 6, 1])
    return tf.summary.merge([
        tf.summary.scalar('cross_entropy', cross_entropy),
        tf.summary.scalar('training_accuracy', accuracy),
        tf.summary.histogram('W_conv1', W_conv1),
        tf.summary.image('W_conv1_filters', grid)])


def set_seed(seed):
    """Makes the runs of one seed, if there is one, the same; to be called before the graph."""
    if seed is not None:
        tf.set_random_seed(seed)
        os.environ['TF_DETERMINISTIC_OPS'] = '1'  # a GPU then adds in the same order each time


def session_config(bfloat16):
    """The session's settings; bfloat16: whether to compute in it, where the CPU can."""
    config = tf.ConfigProto()
    if bfloat16 and computes_in_bfloat16():
        rewrites = config.graph_options.rewrite_options
        rewrites.auto_mixed_precision_onednn_bfloat16 = rewrites.ON
    elif bfloat16:
        print('--bfloat16: this CPU could only emulate it, slowly; training in float32',
              file=sys.stderr)
    return config


def computes_in_bfloat16():
    """Whether the CPU has bfloat16 instructions (AVX512_BF16, AMX) and oneDNN may use them.

    TensorFlow doesn't tell; Linux does. oneDNN's limits are those of
    https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html
    """
    limit = os.environ.get('ONEDNN_MAX_CPU_ISA', '').upper()
    if limit in ('SSE41', 'AVX', 'AVX2', 'AVX2_VNNI', 'AVX2_VNNI_2', 'AVX512_CORE',
                 'AVX512_CORE_VNNI') or os.environ.get('TF_ENABLE_ONEDNN_OPTS') == '0':
        return False
    try:
        with open('/proc/cpuinfo') as cpuinfo:
            return not {'avx512_bf16', 'amx_bf16'}.isdisjoint(cpuinfo.read().split())
    except OSError:
        return False


def parse_flags(argv):
    """Returns the parser, for its one-line errors, and the flags."""
    parser = flag_parser(__doc__)
    return parser, checked_flags(parser, argv)


def flag_parser(description):
    """The parser of this script's flags, to which others can be added."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument('--data_dir', default=os.path.join(here, 'MNIST_data'),
                        help='folder of the MNIST files; those missing are downloaded')
    parser.add_argument('--max_steps', type=int, default=20000, help='number of training steps')
    parser.add_argument('--batch_size', type=int, default=50, help='number of examples in a step')
    parser.add_argument('--learning_rate', type=float, default=1e-4, help='of the Adam optimizer')
    parser.add_argument('--seed', type=int, help='whole number: the same one gives the same run')
    parser.add_argument('--model_dir',
                        help='folder for checkpoints, to resume from, and TensorBoard; none: '
                        'nothing is kept')
    parser.add_argument('--save_checkpoints_steps', type=int, default=1000,
                        help='training steps from one checkpoint to the next')
    parser.add_argument('--bfloat16', action='store_true',
                        help='compute in bfloat16, about 1.5 times as fast, if the CPU can')
    return parser


def checked_flags(parser, argv):
    """The parsed flags; ends the program with one line if a number is out of range."""
    flags = parser.parse_args(argv)
    for name in ('max_steps', 'batch_size', 'learning_rate', 'save_checkpoints_steps'):
        if not 0 < getattr(flags, name) < math.inf:
            parser.error(f'argument --{name}: {getattr(flags, name)} is not a number above 0')
    return flags


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
