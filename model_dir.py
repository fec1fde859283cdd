"""What `--model_dir` adds to a training: checkpoints to go on from, and events for TensorBoard.

`mnist_deep.py` loads this file only when that flag is given. One training at a time uses a folder.
Nothing in it is ever deleted, but for checkpoints that newer ones replace.
"""

import contextlib
import glob
import math
import os
import re
import sys
import tempfile

import tensorflow.compat.v1 as tf

CHECKPOINT = 'mnist_deep.ckpt'  # what the checkpoints' file names begin with


class ModelDir:
    """The folder of a training, as a context: what ends the training, its last step is saved.

    Args:
        flags: those of `mnist_deep.py`.
        progress: its function of that name.

    Raises, where it is entered:
        OSError: the folder cannot be made, or another training uses it.
        ValueError: TensorFlow cannot use a folder of that name, or it holds something else.
    """

    def __init__(self, flags, progress):
        self.flags, self.progress, self.folder = flags, progress, flags.model_dir
        self.saver = tf.train.Saver(max_to_keep=2, save_relative_paths=True)
        self.writer, self.training, self.saved = None, False, 0

    def __enter__(self):
        self.lock = claim(self.folder)
        return self

    def resume(self, train, cross_entropy, accuracy):
        """Goes on from the newest whole checkpoint, if there is one, in the default session.

        Args:
            train: the training set. With --seed, its order goes on where the earlier runs left it.
            cross_entropy, accuracy: scalar tensors, to be shown in TensorBoard.

        Returns:
            start: how many steps are done.
            save: to be called after each step, with the number of steps that are done.
            accuracy: the same; to evaluate it, in training, also writes for TensorBoard.

        Raises:
            OSError: there are steps to be done, and nothing can be written in the folder.
            ValueError: its checkpoints are of another network, or none of them is whole.
        """
        observed_accuracy = self.observe(cross_entropy, accuracy)
        self.all_finite = tf.reduce_all([tf.reduce_all(tf.is_finite(weights))
                                         for weights in tf.trainable_variables()])
        path = find_checkpoint(self.folder, {v.op.name: v for v in tf.global_variables()})
        if path:
            self.saver.restore(tf.get_default_session(), path)
            take_over_checkpoints(self.saver, path)
            self.saved = steps_of(path)

        start, end = self.saved, self.flags.max_steps
        if start >= end:
            print(f'trained for {start} steps already', file=sys.stderr)
        else:
            if start:
                print(f'going on from step {start} of {end}', file=sys.stderr)
            self.begin(start, train)
        return start, self.save_if_due, observed_accuracy

    def observe(self, cross_entropy, accuracy):
        """The accuracy, as a tensor whose evaluation also writes a summary of the training."""
        write = tf.py_func(lambda summary, step: self.writer.add_summary(summary, step),
                           [training_summaries(cross_entropy, accuracy),
                            tf.train.get_global_step()], [])
        with tf.control_dependencies([write]):
            return tf.identity(accuracy)

    def begin(self, start, train):
        """Makes ready for the steps from `start` on."""
        make_ready(self.folder)
        if start and self.flags.seed is not None:
            draw_again(self.progress, start, train, self.flags.batch_size)
        self.open_writer(start)
        self.writer.add_graph(tf.get_default_graph())
        # TensorBoard then forgets the later steps of a run that was killed.
        self.writer.add_session_log(tf.SessionLog(status=tf.SessionLog.START), start)
        self.training = True

    def open_writer(self, start):
        """Opens an event file: those of one second differ in the step that they begin with."""
        self.writer = tf.summary.FileWriter(self.folder, filename_suffix=f'.from_step_{start}')

    def save_if_due(self, step):
        """Saves every --save_checkpoints_steps steps and after the last one.

        Raises:
            OSError: the checkpoint cannot be written.
            ValueError: the loss, and so the weights, are no numbers any more.
        """
        last = step == self.flags.max_steps
        due = last or step % self.flags.save_checkpoints_steps == 0
        if due or step % 100 == 0:
            self.refuse_nan(step)
        if due:
            self.save(step)
        self.training = not last

    def refuse_nan(self, step):
        """ValueError: the loss was not a number, and so the weights are none."""
        if not self.all_finite.eval():
            raise ValueError(f'at step {step} the loss is not a number: try a --learning_rate '
                             f'smaller than {self.flags.learning_rate:g}')

    def save(self, step):
        """Saves a checkpoint, and what was written for TensorBoard so far."""
        try:
            self.saver.save(tf.get_default_session(), os.path.join(self.folder, CHECKPOINT), step,
                            write_meta_graph=False)
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            remove_temporary_files(self.folder)
            kept = f'that of step {self.saved} is kept' if self.saved else 'there is no earlier one'
            raise OSError(f'--model_dir {self.folder}: the checkpoint of step {step} cannot be '
                          f'saved ({reason(error)}); {kept}') from error
        self.writer.flush()
        self.saved = step

    def __exit__(self, kind, error, _):
        try:
            if self.training:  # it was stopped, or its output is closed: that costs no steps
                step = int(tf.train.get_global_step().eval())
                self.refuse_nan(step)
                if step > self.saved:
                    self.save(step)
            if self.saved and isinstance(error, KeyboardInterrupt):
                error.args = f'stopped at step {self.saved}, kept in {self.folder}',
        finally:
            if self.writer:
                self.writer.close()
            if self.lock:
                self.lock.close()

    def write_mistakes(self, batches, x, y_, keep_prob, y_conv):
        """Writes, for TensorBoard, the test images that the trained network gets wrong, each as
        mistakes/CLASS_taken_for_PREDICTION. A run that only evaluates writes them if they are
        missing.

        Args:
            batches: iterable of (images, labels), all of the test set.
            x, y_, keep_prob, y_conv: tensors of the tutorial's.
        """
        step = int(tf.train.get_global_step().eval())
        if not self.writer:
            if not self.lock or has_mistakes(self.folder, step):
                return
            self.open_writer(step)
        predictions, classes = tf.argmax(y_conv, 1), tf.argmax(y_, 1)
        wrong = tf.where(tf.not_equal(predictions, classes))[:, 0]
        pixels = tf.reshape(tf.gather(x, wrong), [-1, 28, 28, 1])
        pictures = tf.map_fn(tf.image.encode_png, tf.cast(tf.round(pixels * 255), tf.uint8),
                             fn_output_signature=tf.string)
        mistakes = [wrong, tf.gather(classes, wrong), tf.gather(predictions, wrong), pictures]
        first, summary = 0, tf.Summary()
        for images, labels in batches:
            found = tf.get_default_session().run(mistakes, {x: images, y_: labels, keep_prob: 1.0})
            for number, label, prediction, picture in zip(*found):
                summary.value.add(
                    tag=f'mistakes/{label}_taken_for_{prediction}/test_image_{first + number}',
                    image=tf.Summary.Image(height=28, width=28, colorspace=1,
                                           encoded_image_string=picture))
            first += len(images)
        self.writer.add_summary(summary, step)  # at once: all of them, or none


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


def draw_again(progress, steps, train, batch_size):
    """Draws the random numbers of the first steps once more, so that the next ones are next.

    In each process, the order of the minibatches and dropout begin anew from the seed. Dropout
    draws [batch_size, 1024] numbers each time the network runs: in each training step and, every
    100 steps, for the training accuracy. Only its random operation is run here, for ten steps at a
    time: that takes the generator as far as ten runs do.
    """
    dropout = next(op for op in tf.get_default_graph().get_operations()
                   if op.type == 'RandomUniform' and op.name.startswith('dropout/'))
    shape, = dropout.inputs
    for ten in progress(range(math.ceil(steps / 10))):
        batches = min(10, steps - 10 * ten)
        for _ in range(batches):
            train.next_batch(batch_size)
        runs = batches + 1 if ten % 10 == 0 else batches
        dropout.run(feed_dict={shape: [runs * batch_size, 1024]})


def restore_newest(folder):
    """Restores a trained network into the default graph's variables, in the default session.

    Args:
        folder: path of what `--model_dir` has kept.

    Raises:
        ValueError: no checkpoint is there, none is whole, or they are of another network.
    """
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    path = find_checkpoint(folder, variables)
    if not path:
        raise ValueError(f'--model_dir {folder}: no checkpoint of a trained network there; train '
                         f'one with: python mnist_deep.py --model_dir {folder}')
    tf.train.Saver(variables).restore(tf.get_default_session(), path)


def find_checkpoint(folder, variables):
    """The path of a folder's newest whole checkpoint, None if it has none at all.

    A damaged one is named on standard error; the one before it is taken then.

    Args:
        folder: path of the folder, which may not exist.
        variables: dict, name in the checkpoint -> variable, of what a checkpoint has to hold.

    Raises:
        ValueError: all checkpoints are damaged, or one is of another network.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            reader = tf.train.load_checkpoint(path)
            shapes = reader.get_variable_to_shape_map()
            for name in shapes:
                reader.get_tensor(name)  # compares its checksum
        except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
            print(f'{path} is damaged ({reason(error)})', file=sys.stderr)
            continue
        if any(shapes.get(name) != variable.shape.as_list()
               for name, variable in variables.items()):
            raise ValueError(f'--model_dir {folder}: its checkpoint is of another model; name a '
                             'new folder')
        return path
    if paths:
        raise ValueError(f'--model_dir {folder}: none of its checkpoints is whole; name a new '
                         'folder')
    return None


def checkpoints(folder):
    """The paths of the checkpoints in a folder, the newest first."""
    refuse_pattern(folder)
    indexes = glob.glob(f'{glob.escape(folder)}/{CHECKPOINT}-*.index')
    return sorted((path.removesuffix('.index') for path in indexes), key=steps_of, reverse=True)


def steps_of(path):
    """The number of steps in a checkpoint's path."""
    return int(re.search(r'\d+$', path)[0])


def refuse_pattern(folder):
    """ValueError: TensorFlow cannot use a folder of that name."""
    if not folder:
        raise ValueError("--model_dir '': the name is empty; name a folder")
    if set(folder) & set('*?[' if os.name == 'nt' else '*?[\\'):
        raise ValueError(f'--model_dir {folder}: TensorFlow takes *, ?, [ and \\ in a path for a '
                         'pattern of several; name a folder without them')
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise ValueError(f'--model_dir {os.fsencode(folder)}: TensorFlow takes names in UTF-8 only;'
                         ' name another folder') from None


def refuse_foreign(folder):
    """ValueError: the folder has no checkpoint of the network, but something else."""
    ours = (CHECKPOINT, 'checkpoint.tmp', 'events.out.tfevents', '.', 'lost+found')
    others = [name for name in sorted(os.listdir(folder)) if not name.startswith(ours)]
    if others and not checkpoints(folder):
        raise ValueError(f'--model_dir {folder}: it holds {others[0]}, and no checkpoint of this '
                         'network; name a new folder')


def has_mistakes(folder, step):
    """Whether TensorBoard has the images that the network got wrong after so many steps."""
    for path in glob.glob(f'{glob.escape(folder)}/events.out.tfevents.*'):
        with contextlib.suppress(tf.errors.DataLossError):  # the end of a run that was killed
            for event in tf.train.summary_iterator(path):
                if event.step == step and any(value.tag.startswith('mistakes/')
                                              for value in event.summary.value):
                    return True
    return False


def take_over_checkpoints(saver, path):
    """Lets a saver count the checkpoints up to this one as its own: it then deletes the oldest."""
    older = reversed(checkpoints(os.path.dirname(path)))
    saver.recover_last_checkpoints([p for p in older if steps_of(p) <= steps_of(path)])


def make_ready(folder):
    """Makes a claimed folder ready for checkpoints; OSError: nothing can be written there."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f'--model_dir {folder}: {error.strerror}') from error
    remove_temporary_files(folder)  # those of a run that was killed while it saved


def remove_temporary_files(folder):
    """Removes what an unfinished save has left."""
    for path in glob.glob(f'{glob.escape(folder)}/{CHECKPOINT}-*.tempstate*'):
        os.remove(path)


def reason(error):
    """What TensorFlow says about a file, without the rest of the operation's report."""
    found = re.search(r'(?:^|; )([^;\n]+)$', str(error).split('\n\t')[0])
    return found[1] if found else type(error).__name__


def claim(folder):
    """Makes a folder, if need be, and locks it until the file that is returned is closed.

    The lock is the operating system's, so it ends with the process, however that ends: a file whose
    mere presence locks would stay after a kill.

    Returns:
        The open file; None where nothing can be written: a finished network can be tested there.

    Raises:
        OSError: the folder cannot be made, or a training uses it.
        ValueError: TensorFlow cannot use a folder of that name, or it holds something else.
    """
    refuse_pattern(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        refuse_foreign(folder)
        lock = open(os.path.join(folder, '.lock'), 'a')  # noqa: SIM115
    except OSError as error:
        if os.path.isdir(folder):
            return None
        raise OSError(f'--model_dir {folder}: {error.strerror}') from error
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise OSError(f'--model_dir {folder}: another training uses it; wait for its end, or name '
                      'another folder') from None
    except OSError:
        pass  # a file system without locks
    return lock
