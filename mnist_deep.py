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


def stop(step, hint=''):
    """Ends the program as Ctrl-C should: with one line and exit code 130."""
    print(f'stopped at step {step}{hint}', file=sys.stderr)
    sys.exit(130)


# TensorFlow greets on file descriptor 2 as it loads, whatever its log level: out of sight, unless
# TF_CPP_MIN_LOG_LEVEL=0 asks for it.
screen = os.dup(2)
if os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3') != '0':
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import input_data
    import tensorflow.compat.v1 as tf
except KeyboardInterrupt:
    os.dup2(screen, 2)
    stop(0)
finally:
    os.dup2(screen, 2)
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
    if flags.seed is not None:
        tf.set_random_seed(flags.seed)
        os.environ['TF_DETERMINISTIC_OPS'] = '1'  # sums in one order on a GPU, too

    # Import data
    try:
        mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)
        pixels = mnist.validation.next_batch(1)[0].size
        if pixels != 784:
            raise ValueError(f'images of {pixels} pixels, expected 28x28')
    except (OSError, ValueError) as error:
        parser.error(f'--data_dir {flags.data_dir}, or --seed: {error}')

    # Create the model
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_ = tf.placeholder(tf.float32, shape=[None, 10])
    y_conv, keep_prob = deepnn(x)

    with tf.name_scope('loss'):
        cross_entropy = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv))

    with tf.name_scope('adam_optimizer'):
        global_step = tf.train.get_or_create_global_step()
        train_step = tf.train.AdamOptimizer(flags.learning_rate).minimize(
            cross_entropy, global_step=global_step)

    with tf.name_scope('accuracy'):
        correct_prediction = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))

    saver = tf.train.Saver(max_to_keep=2, save_relative_paths=True)
    summaries = training_summaries(cross_entropy, accuracy)

    with tf.Session(config=session_config(flags.bfloat16)) as sess:
        sess.run(tf.global_variables_initializer())
        start, writer = 0, None
        if flags.model_dir:
            try:
                start = resume(sess, saver, flags.model_dir)
            except (OSError, ValueError) as error:
                parser.error(f'--model_dir {flags.model_dir}: {error}')
            if start:
                print(f'going on from step {start} of {flags.max_steps}', file=sys.stderr)
            if start < flags.max_steps:
                writer = tf.summary.FileWriter(flags.model_dir, sess.graph)
                # What an earlier run wrote of later steps, before it was killed, is void.
                writer.add_session_log(tf.SessionLog(status=tf.SessionLog.START), start)

        def save():
            saver.save(sess, os.path.join(flags.model_dir, CHECKPOINT), global_step,
                       write_meta_graph=False)
            writer.flush()

        try:
            if flags.seed is not None:
                for _ in range(min(start, flags.max_steps)):  # these the earlier runs have had
                    mnist.train.next_batch(flags.batch_size)

            # Train
            for i in progress(range(start, flags.max_steps)):
                batch = mnist.train.next_batch(flags.batch_size)
                if i % 100 == 0:
                    train_accuracy, summary = sess.run([accuracy, summaries], feed_dict={
                        x: batch[0], y_: batch[1], keep_prob: 1.0})
                    print('step %d, training accuracy %g' % (i, train_accuracy), flush=True)
                    if writer:
                        writer.add_summary(summary, i)
                train_step.run(feed_dict={x: batch[0], y_: batch[1], keep_prob: 0.5})
                if writer and ((i + 1) % flags.save_checkpoints_steps == 0
                               or i + 1 == flags.max_steps):
                    save()

            # Test the trained network
            correct = 0
            for images, labels in in_batches(mnist.test):
                correct += correct_prediction.eval(feed_dict={
                    x: images, y_: labels, keep_prob: 1.0}).sum()
            print('test accuracy %g' % (correct / mnist.test.num_examples))
            if writer:
                write_mistakes(writer, mnist.test, x, y_, keep_prob, y_conv)
                writer.close()
        except KeyboardInterrupt:
            usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one is not to stop this
            if writer:
                save()
            signal.signal(signal.SIGINT, usual)
            stop(global_step.eval(), f', kept in {flags.model_dir}' if flags.model_dir else '')


def in_batches(data_set, size=200):
    """Yields all examples once, a few at a time.

    The first layer's output for all 10,000 test images at once would take a gigabyte.
    """
    for start in progress(range(0, data_set.num_examples, size)):
        yield data_set.next_batch(min(size, data_set.num_examples - start), shuffle=False)


def progress(steps):
    """Yields the steps; on a terminal, standard error shows their speed and the time left.

    Ctrl-C waits until a step is done: amid a session's run it can crash TensorFlow.
    """
    pressed, usual = [], signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:  # which is what background jobs do
        signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    began = shown = time.monotonic()
    try:
        for done, step in enumerate(steps, 1):
            yield step
            if pressed:
                raise KeyboardInterrupt
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


# What follows serves --bfloat16, --model_dir and the other flags; the network is above.


def session_config(bfloat16):
    """The session's settings; bfloat16: whether to compute in it, where the CPU can."""
    config = tf.ConfigProto()
    config.gpu_options.allow_growth = True  # a GPU's memory as it is needed, not all of it
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


CHECKPOINT = 'mnist_deep.ckpt'  # what the checkpoints' file names begin with


def resume(sess, saver, model_dir):
    """Restores the folder's newest checkpoint, if it has one, into the session.

    Returns:
        The number of steps that the network in it was trained for; 0 for a new folder.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: it holds something else than this network.
    """
    os.makedirs(model_dir, exist_ok=True)
    tempfile.TemporaryFile(dir=model_dir).close()  # raises if nothing can be written
    state = tf.train.get_checkpoint_state(model_dir)
    if state is None:
        ours = (CHECKPOINT, 'checkpoint.tmp', 'events.out.tfevents')
        others = [name for name in sorted(os.listdir(model_dir)) if not name.startswith(ours)]
        if others:
            raise ValueError(f'it holds {others[0]}, and no checkpoint of this network; '
                             'name a new folder')
        return 0

    expected = {variable.op.name: variable.shape.as_list() for variable in tf.global_variables()}
    try:
        found = tf.train.load_checkpoint(state.model_checkpoint_path).get_variable_to_shape_map()
    except (tf.errors.OpError, ValueError) as error:
        raise ValueError(f'its checkpoint cannot be read ({error}); name a new folder') from error
    if found != expected:
        raise ValueError('its checkpoint is of another model; name a new folder')
    saver.restore(sess, state.model_checkpoint_path)
    saver.recover_last_checkpoints(state.all_model_checkpoint_paths)
    for leftover in glob.glob(os.path.join(glob.escape(model_dir), CHECKPOINT + '*.tempstate*')):
        os.remove(leftover)  # of a run that was killed while it saved
    return tf.train.get_global_step().eval()


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


def write_mistakes(writer, data_set, x, y_, keep_prob, y_conv):
    """Writes, for TensorBoard, the images that the network gets wrong and what it took them for."""
    guesses, classes = tf.argmax(y_conv, 1), tf.argmax(y_, 1)
    wrong = tf.where(tf.not_equal(guesses, classes))[:, 0]
    pixels = tf.reshape(tf.gather(x, wrong), [-1, 28, 28, 1])
    pictures = tf.map_fn(tf.image.encode_png, tf.cast(tf.round(pixels * 255), tf.uint8),
                         fn_output_signature=tf.string)
    mistakes = [wrong, tf.gather(classes, wrong), tf.gather(guesses, wrong), pictures]
    start = 0
    for images, labels in in_batches(data_set):
        found = tf.get_default_session().run(mistakes, {x: images, y_: labels, keep_prob: 1.0})
        for number, label, guess, picture in zip(*found):
            writer.add_summary(tf.Summary(value=[tf.Summary.Value(
                tag=f'mistakes/{label}_taken_for_{guess}/test_image_{start + number}',
                image=tf.Summary.Image(height=28, width=28, colorspace=1,
                                       encoded_image_string=picture))]))
        start += len(images)


def parse_flags(argv):
    """Returns the parser, for its one-line errors, and the flags."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__,
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
    flags = parser.parse_args(argv)
    for name in ('max_steps', 'batch_size', 'learning_rate', 'save_checkpoints_steps'):
        if not 0 < getattr(flags, name) < math.inf:
            parser.error(f'argument --{name}: {getattr(flags, name)} is not a number above 0')
    return parser, flags


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        stop(0)
