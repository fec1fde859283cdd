"""What `--model_dir` adds to a training: checkpoints to go on from, and events for TensorBoard.

`mnist_deep.py` loads this file only when that flag is given. One training at a time uses a folder.
Nothing in it is ever deleted but old checkpoints, and what an unfinished save has left.
"""

import contextlib
import glob
import math
import os
import re
import signal
import sys
import tempfile
import threading

import numpy as np
import tensorflow.compat.v1 as tf

CHECKPOINT = 'mnist_deep.ckpt'  # what the checkpoints' file names begin with


class ModelDir:
    """The folder of a training, as a context: whatever ends the training, its last step is saved.

    Args:
        flags: those of `mnist_deep.py`.

    Raises, where it is entered:
        OSError: the folder cannot be made, or another training uses it.
        ValueError: TensorFlow cannot use a folder of that name, or it holds something else.
    """

    def __init__(self, flags):
        self.flags, self.folder = flags, flags.model_dir
        self.checkpoints = Checkpoints(
            self.folder, {variable.op.name: variable for variable in tf.global_variables()})
        self.training = False
        self.writer = self.unwritten = None  # for TensorBoard, and the error that ended that

    def __enter__(self):
        self.lock = claim(self.folder)
        return self

    def resume(self, train, cross_entropy, accuracy):
        """Goes on from the newest whole checkpoint, if there is one, in the default session.

        Args:
            train: the training set. With --seed, its order goes on where the earlier runs left it.
            cross_entropy, accuracy: scalar tensors, to be shown in TensorBoard.

        Returns:
            steps: iterator over the numbers of the steps that are left. It saves those that are
                due, and ends early, by `Stopped`, after a signal.
            accuracy: the same; to evaluate it, in training, also writes for TensorBoard.

        Raises:
            OSError: there are steps left, and nothing can be written in the folder.
            ValueError: its checkpoints are of another network, or all of them are damaged.
        """
        accuracy = self.observe(cross_entropy, accuracy)
        path = self.checkpoints.find()
        if path:
            self.checkpoints.saver.restore(tf.get_default_session(), path)

        start, end = self.checkpoints.saved, self.flags.max_steps
        if start >= end:
            print(f'trained for {start} steps already', file=sys.stderr)
            return iter(()), accuracy
        if start:
            print(f'going on from step {start} of {end}', file=sys.stderr)
        self.begin(start, train)
        return self.steps(start), accuracy

    def observe(self, cross_entropy, accuracy):
        """The accuracy, as a tensor whose evaluation also writes a summary of the training."""
        write = tf.py_func(lambda summary, step: self.write('add_summary', summary, step),
                           [training_summaries(cross_entropy, accuracy),
                            tf.train.get_global_step()], [])
        with tf.control_dependencies([write]):
            return tf.identity(accuracy)

    def begin(self, start, train):
        """Makes ready for the steps from `start` on."""
        make_ready(self.folder)
        if start and self.flags.seed is not None:
            draw_again(start, train, self.flags.batch_size)
        self.open_writer(start)
        self.write('add_graph', tf.get_default_graph())
        # TensorBoard then forgets the later steps of a run that was killed.
        self.write('add_session_log', tf.SessionLog(status=tf.SessionLog.START), start)

    def steps(self, start):
        """Yields the steps from `start` on, and saves after those that are due."""
        self.training = True
        with signals_held_back() as signals:
            for done in range(start + 1, self.flags.max_steps + 1):
                yield done - 1
                if done == self.flags.max_steps or done % self.flags.save_checkpoints_steps == 0:
                    self.checkpoints.save(tf.get_default_session())
                    self.write('flush')
                self.training = done < self.flags.max_steps
                if self.training and self.unwritten:
                    raise OSError(self.unwritten)
                if signals:
                    break

    def open_writer(self, start):
        """Opens an event file: those of one second differ in the step that they begin with."""
        try:
            self.writer = tf.summary.FileWriter(self.folder, filename_suffix=f'.from_step_{start}')
        except (tf.errors.OpError, OSError) as error:
            self.note_unwritten(error)

    def write(self, method, *arguments):
        """Calls a method of the event writer. Its error is kept: a trained network is tested, even
        if the disk is full.
        """
        if self.unwritten is None:
            try:
                getattr(self.writer, method)(*arguments)
            except (tf.errors.OpError, OSError) as error:
                self.note_unwritten(error)

    def note_unwritten(self, error):
        self.unwritten = (f'--model_dir {self.folder}: nothing can be written for TensorBoard '
                          f'({reason(error)})')

    def __exit__(self, kind, error, _):
        try:
            if self.training:  # it was stopped, or its output was closed: that costs no steps
                self.checkpoints.save(tf.get_default_session())
            if self.checkpoints.saved and isinstance(error, KeyboardInterrupt):
                error.args = (f'stopped at step {self.checkpoints.saved}, kept in {self.folder}',)
        finally:
            if self.writer:
                self.write('close')
            if self.unwritten and kind is None:
                print(self.unwritten, file=sys.stderr)
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
        self.write('add_summary', summary, step)  # at once: all of them, or none


class Stopped(KeyboardInterrupt):
    """A signal has ended the training. `exit_code` is the one by which a shell tells that."""

    def __init__(self, number):
        super().__init__('stopped')
        self.exit_code = 128 + number


class Checkpoints:
    """The checkpoints of a training in a folder, of which the last two are kept.

    Args:
        folder: path of the folder.
        variables: dict, name in a checkpoint -> variable, of all that it holds.

    Attributes:
        saved: how many steps the last one has, 0 if there is none.
        saver: the tf.train.Saver.
    """

    def __init__(self, folder, variables):
        self.folder, self.variables, self.saved = folder, variables, 0
        self.saver = tf.train.Saver(variables, max_to_keep=2, save_relative_paths=True)
        with tf.name_scope('all_finite'):
            self.all_finite = tf.reduce_all([
                tf.reduce_all(tf.is_finite(variable)) for variable in variables.values()
                if variable.dtype.base_dtype.is_floating])

    def find(self):
        """The path of the newest whole one, to restore it and go on from there; None without any.

        ValueError: all are damaged, or one is of another network.
        """
        path = find_checkpoint(self.folder, self.variables)
        if path:
            self.saved = steps_of(path)
            older = reversed(checkpoints(self.folder))  # of which the saver deletes the oldest
            self.saver.recover_last_checkpoints([p for p in older if steps_of(p) <= self.saved])
        return path

    def save(self, session):
        """Saves one, unless this step is saved already.

        Raises:
            OSError: it cannot be written.
            ValueError: the loss was not a number, and so the weights are none.
            tf.errors.OpError: a machine of the session's cluster does not answer.
        """
        step, all_finite = session.run([tf.train.get_global_step(session.graph), self.all_finite])
        if not all_finite:
            raise ValueError(f'at step {step} the loss is not a number, so nothing is saved; try a '
                             'smaller --learning_rate')
        if step <= self.saved:
            return
        try:
            self.saver.save(session, os.path.join(self.folder, CHECKPOINT), step,
                            write_meta_graph=False)
        except (tf.errors.AbortedError, tf.errors.UnavailableError):
            raise  # a machine of a cluster is gone
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            remove_temporary_files(self.folder)
            kept = f'that of step {self.saved} is kept' if self.saved else 'there is no earlier one'
            raise OSError(f'--model_dir {self.folder}: the checkpoint of step {step} cannot be '
                          f'saved ({reason(error)}); {kept}') from error
        self.saved = int(step)


def training_summaries(cross_entropy, accuracy):
    """What TensorBoard shows of the training: two curves, and what the first layer learned."""
    W_conv1 = tf.trainable_variables('conv1')[0]
    with tf.name_scope('filters'):  # 4 rows of 8, 5x5 pixels each and a white one between them
        grey = tf.cast(127.5 + 127.5 * W_conv1 / tf.reduce_max(tf.abs(W_conv1)), tf.uint8)
        tiles = tf.pad(tf.reshape(grey, [5, 5, 4, 8]), [[0, 1], [0, 1], [0, 0], [0, 0]],
                       constant_values=255)
        grid = tf.reshape(tf.transpose(tiles, [2, 0, 3, 1]), [1, 4 * 6, 8 * 6, 1])
    return tf.summary.merge([
        tf.summary.scalar('cross_entropy', cross_entropy),
        tf.summary.scalar('training_accuracy', accuracy),
        tf.summary.histogram('W_conv1', W_conv1),
        tf.summary.image('W_conv1_filters', grid)])


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
    for ten in range(math.ceil(steps / 10)):
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
        ValueError: no checkpoint is there, all are damaged, or they are of another network.
    """
    variables = {variable.op.name: variable for variable in tf.global_variables()}
    path = find_checkpoint(folder, variables,
                           'train another one: python mnist_deep.py --model_dir NEW_FOLDER')
    if not path:
        raise ValueError(f'--model_dir {folder}: no checkpoint of a trained network there; train '
                         f'one with: python mnist_deep.py --model_dir {folder}')
    tf.train.Saver(variables).restore(tf.get_default_session(), path)


def find_checkpoint(folder, variables, advice='name a new folder'):
    """The path of a folder's newest whole checkpoint, None if it has none at all.

    A damaged one is named on standard error; the one before it is taken then.

    Args:
        folder: path of the folder, which may not exist.
        variables: dict, name in the checkpoint -> variable, of what a checkpoint has to hold.
        advice: what to do if none can be used.

    Raises:
        ValueError: all checkpoints are damaged, or one is of another network.
    """
    paths = checkpoints(folder)
    for path in paths:
        try:
            reader = tf.train.load_checkpoint(path)
            shapes = reader.get_variable_to_shape_map()
            for name in shapes:
                values = np.asarray(reader.get_tensor(name))  # which compares its checksum
                if values.dtype.kind == 'f' and not np.isfinite(values).all():
                    raise ValueError(f'{name} is not a number')
        except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
            print(f'{path} is damaged ({reason(error)})', file=sys.stderr)
            continue
        if any(shapes.get(name) != variable.shape.as_list()
               for name, variable in variables.items()):
            raise ValueError(f'--model_dir {folder}: its checkpoint is of another network; '
                             f'{advice}')
        return path
    if paths:
        raise ValueError(f'--model_dir {folder}: all its checkpoints are damaged; {advice}')
    return None


def checkpoints(folder):
    """The paths of the checkpoints in a folder, the newest first."""
    refuse_pattern(folder)
    indexes = glob.glob(f'{glob.escape(folder)}/{CHECKPOINT}-*.index')
    paths = [path.removesuffix('.index') for path in indexes]
    paths = [path for path in paths if steps_of(path) is not None]  # a copy's name says more
    return sorted(paths, key=steps_of, reverse=True)


def steps_of(path):
    """The number of steps in a checkpoint's path, None if it is not the path of one."""
    found = re.fullmatch(fr'{re.escape(CHECKPOINT)}-([0-9]+)', os.path.basename(path))
    return found and int(found[1])


def refuse_pattern(folder):
    """ValueError: TensorFlow cannot use a folder of that name."""
    if not folder:
        raise ValueError("--model_dir '': the name is empty; name a folder")
    if '://' in folder:
        raise ValueError(f'--model_dir {folder}: it is a URL; name a folder of this machine')
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
    ours = (CHECKPOINT, 'checkpoint.tmp', 'events.out.tfevents', '.',
            'lost+found')  # which is in the top folder of a disk
    others = [name for name in sorted(os.listdir(folder)) if not name.startswith(ours)]
    if others and not checkpoints(folder):
        raise ValueError(f'--model_dir {folder}: it holds {others[0]}, and no checkpoint of this '
                         'network; name a new folder')


def has_mistakes(folder, step):
    """Whether TensorBoard has the images that the network got wrong after so many steps."""
    for path in glob.glob(f'{glob.escape(folder)}/events.out.tfevents.*'):
        with contextlib.suppress(tf.errors.OpError):  # the end of a run that was killed, say
            for event in tf.train.summary_iterator(path):
                if event.step == step and any(value.tag.startswith('mistakes/')
                                              for value in event.summary.value):
                    return True
    return False


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
        if os.path.isfile(path):
            os.remove(path)


@contextlib.contextmanager
def signals_held_back():
    """Holds Ctrl-C, SIGTERM and SIGHUP back until a step is done, so that it can be saved.

    While TensorFlow goes through a feed_dict in C++, an exception in Python's functions that it
    calls is a segmentation fault, or is lost. A second signal ends the process at once.

    Yields:
        List, to which a signal is added: then this context is to be left, which raises `Stopped`.
    """
    held = []

    def hold_back(number, _):
        held.append(number)
        in_a_shell = hasattr(sys, 'ps1')  # Python's or IPython's: that is not to end
        signal.signal(number, signal.default_int_handler if in_a_shell else signal.SIG_DFL)

    with signals_handled(hold_back):
        yield held
    if held:
        raise Stopped(held[0])


@contextlib.contextmanager
def signals_handled(handler):
    """Sets what Ctrl-C, SIGTERM and SIGHUP (the terminal has gone) do in this context.

    Those that are ignored stay so: Ctrl-C in a shell's background job, SIGHUP after `nohup`.
    """
    usual = {}
    if threading.current_thread() is threading.main_thread():  # no other one gets signals
        numbers = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
                   if hasattr(signal, name)]  # Windows has no SIGHUP
        usual = {number: signal.signal(number, handler) for number in numbers
                 if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, usual_handler in usual.items():
            signal.signal(number, usual_handler)


def reason(error):
    """What TensorFlow says about a file, without the rest of the operation's report."""
    # For example "model/x.tempstate123; No space left on device\n\t [[{{node save/SaveV2}}]]"
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
    except OSError as error:
        raise OSError(f'--model_dir {folder}: {error.strerror}; name another folder') from error
    try:
        lock = open(os.path.join(folder, '.lock'), 'a')  # noqa: SIM115
    except OSError as error:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            return None
        raise OSError(f'--model_dir {folder}: its file .lock, by which a training keeps others '
                      f'out, cannot be opened ({error.strerror}); name another folder') from error
    try:
        if os.name == 'nt':
            import msvcrt
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.close()
        raise OSError(f'--model_dir {folder}: another training uses it; wait until it ends, or '
                      'name another folder') from None
    except OSError:
        pass  # a file system without locks
    return lock
