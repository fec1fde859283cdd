"""What `--model_dir` adds to a training: checkpoints to go on from, and events for TensorBoard.

`mnist_deep.py` loads this file only when that flag is given. One training at a time uses a folder.
Nothing in it is ever deleted but old checkpoints, and what an unfinished save has left.
"""

import contextlib
import errno
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
# What TensorFlow raises where a file cannot be read or written: its C++ code's errors also come as
# Python's own, such as IndexError at a limit of file sizes (ulimit -f).
FILE_ERRORS = tf.errors.OpError, RuntimeError, ValueError, IndexError


class ModelDir:
    """The folder of a training, as a context: whatever ends the training, its last step is saved.

    Args:
        flags: those of `mnist_deep.py`. The default graph has the whole network.

    Attributes:
        events: what TensorBoard shows, an `Events`.

    Raises, where it is entered:
        OSError: the folder cannot be made, or another training uses it.
        ValueError: TensorFlow cannot use a folder of that name, or it holds something else.
    """

    def __init__(self, flags):
        self.flags, self.folder = flags, flags.model_dir
        self.lock = self.events = self.checkpoints = None
        self.has_unsaved_steps = False
        # Signals, as long as there are steps to lose: from the first one on until the last one is
        # saved, which may be after the loop over `steps` has been left.
        self.holding_back = contextlib.ExitStack()

    def __enter__(self):
        self.lock = claim(self.folder)
        self.events = Events(self.folder, self.lock)
        self.checkpoints = Checkpoints(self.folder, self.lock, {
            variable.op.name: variable for variable in tf.global_variables()})
        return self

    def resume(self, train):
        """Goes on from the newest whole checkpoint, if there is one, in the default session.

        Args:
            train: the training set. With --seed, its order goes on where the earlier runs left it.

        Returns:
            Iterator over the numbers of the steps that are left. It saves those that are due, and
            ends early, by `Stopped`, after a signal.

        Raises:
            OSError: there are steps left, and nothing can be written in the folder.
            ValueError: its checkpoints are of another network, or all of them are damaged.
        """
        path = self.checkpoints.find()
        if path:
            self.checkpoints.saver.restore(tf.get_default_session(), path)
        start, end = self.checkpoints.last_step, self.flags.max_steps
        if start >= end:
            print(f'trained for {start} steps already', file=sys.stderr)
            return iter(())
        if start:
            print(f'going on from step {start} of {end}', file=sys.stderr)
        make_ready(self.folder, self.lock)
        if start and self.flags.seed is not None:
            repeat_random_numbers(start, train, self.flags.batch_size)
        self.events.begin(start)
        return self.steps(start)

    def steps(self, start):
        """Yields the steps from `start` on, and saves after those that are due."""
        signals = self.holding_back.enter_context(signals_held_back())
        self.has_unsaved_steps = True
        for step in range(start, self.flags.max_steps):
            yield step
            done = step + 1
            if done == self.flags.max_steps or done % self.flags.save_checkpoints_steps == 0:
                self.checkpoints.save(tf.get_default_session())
                self.events.write('flush')
            self.has_unsaved_steps = done < self.flags.max_steps
            if self.has_unsaved_steps and self.events.fault:
                raise OSError(self.events.fault)
            if signals:
                raise Stopped(signals[0])
        self.holding_back.close()  # a signal may end the test at once

    def __exit__(self, kind, error, _):
        try:
            if self.has_unsaved_steps:  # it was stopped, or its output was closed
                self.checkpoints.save(tf.get_default_session())
            if isinstance(error, KeyboardInterrupt):
                error.args = (self.checkpoints.what_is_kept(),)
        finally:
            self.holding_back.close()
            self.events.close()
            if self.events.fault and kind is None:
                print(self.events.fault, file=sys.stderr)
            if self.lock:
                self.lock.close()


# Checkpoints.


class Checkpoints:
    """The checkpoints of a training in a folder, of which the last two are kept.

    Args:
        folder: path of the folder.
        lock: what `claim` has returned for it; None to read only.
        variables: dict, name in a checkpoint -> variable, of all that it holds.

    Attributes:
        last_step: how many steps the last one has, 0 if there is none.
        saver: the tf.train.Saver.
    """

    def __init__(self, folder, lock, variables):
        self.folder, self.lock, self.variables, self.last_step = folder, lock, variables, 0
        self.saver = tf.train.Saver(variables, max_to_keep=2, save_relative_paths=True)
        with tf.name_scope('all_finite'):
            self.all_finite = tf.reduce_all([
                tf.reduce_all(tf.is_finite(variable)) for variable in variables.values()
                if variable.dtype.base_dtype.is_floating])

    def find(self):
        """The path of the newest whole one, to restore it and go on from there; None without any.

        OSError: it may not be read. ValueError: all are damaged, or one is of another network.
        """
        path = find_checkpoint(self.folder, self.variables)
        if path:
            self.last_step = steps_of(path)
            older = reversed(checkpoints(self.folder))  # of which the saver deletes the oldest
            self.saver.recover_last_checkpoints([p for p in older if steps_of(p) <= self.last_step])
        return path

    def save(self, session):
        """Saves one, unless this step is saved already.

        Raises:
            OSError: it cannot be written.
            ValueError: the loss was not a number, and so the weights are not numbers either.
            tf.errors.OpError: a machine of the session's cluster does not answer.
        """
        step, all_finite = session.run([tf.train.get_global_step(session.graph), self.all_finite])
        if not all_finite:
            raise ValueError(f'at step {step} the loss is not a number, so nothing is saved; try a '
                             'smaller --learning_rate')
        if step <= self.last_step:
            return
        refuse_gone(self.folder, self.lock)
        try:
            self.saver.save(session, os.path.join(self.folder, CHECKPOINT), step,
                            write_meta_graph=False)
        except (tf.errors.AbortedError, tf.errors.UnavailableError):
            raise  # a machine of a cluster is gone
        except (*FILE_ERRORS, OSError) as error:
            refuse_gone(self.folder, self.lock)  # before something of another training is removed
            remove_temporary_files(self.folder)
            kept = (f'that of step {self.last_step} is kept' if self.last_step
                    else 'there is no earlier one')
            raise OSError(f'--model_dir {self.folder}: the checkpoint of step {step} cannot be '
                          f'saved ({reason(error)}); {kept}') from error
        self.last_step = int(step)

    def what_is_kept(self):
        """What a training that was stopped says in the end."""
        if not self.last_step:
            return 'stopped'
        return f'stopped at step {self.last_step}, kept in {self.folder}'


def restore_newest(folder):
    """Restores a trained network into the default graph's variables, in the default session.

    Args:
        folder: path of what `--model_dir` has kept.

    Raises:
        OSError: it may not be read.
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
        OSError: the folder or a file in it may not be read.
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
        except FILE_ERRORS as error:
            if reason(error) == os.strerror(errno.EACCES):
                raise OSError(f'--model_dir {folder}: {reason(error)}: its checkpoint may not be '
                              'read; ask its owner for that, or name another folder') from error
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
    """The paths of the checkpoints in a folder, the newest first; OSError: it may not be read."""
    refuse_pattern(folder)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise OSError(f'--model_dir {folder}: {error.strerror}: it may not be read; ask its owner '
                      'for that, or name another folder') from error
    paths = [os.path.join(folder, name.removesuffix('.index'))
             for name in names if name.endswith('.index')]
    paths = [path for path in paths if steps_of(path) is not None]  # a copy's name says more
    return sorted(paths, key=steps_of, reverse=True)


def steps_of(path):
    """The number of steps in a checkpoint's path, None if it is not the path of one."""
    found = re.fullmatch(fr'{re.escape(CHECKPOINT)}-([0-9]+)', os.path.basename(path))
    return found and int(found[1])


def reason(error):
    """What TensorFlow says about a file, without the rest of the operation's report."""
    # For example "model/x.tempstate123; No space left on device\n\t [[{{node save/SaveV2}}]]"
    found = re.search(r'(?:^|; )([^;\n]+)$', str(error).split('\n\t')[0])
    return found[1] if found else type(error).__name__


def repeat_random_numbers(steps, train, batch_size):
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


# Signals.


class Stopped(KeyboardInterrupt):
    """A signal has ended the training. `exit_code` is the one by which a shell tells that."""

    def __init__(self, number):
        super().__init__('stopped')
        self.exit_code = 128 + number


@contextlib.contextmanager
def signals_held_back():
    """Holds Ctrl-C, SIGTERM and SIGHUP (the terminal has gone) back, so that a step can be saved.

    While TensorFlow goes through a feed_dict in C++, an exception in Python's functions that it
    calls is a segmentation fault, or is lost. Those that are ignored stay so: Ctrl-C in a shell's
    background job, SIGHUP after `nohup`.

    Yields:
        List, to which the signals are added: the first one says that the training has to end. A
        second Ctrl-C, for which somebody has to press it again, ends the process at once.
    """
    held = []

    def hold_back(number, _):
        held.append(number)
        if number == signal.SIGINT:
            in_a_shell = hasattr(sys, 'ps1')  # Python's or IPython's: that is not to end
            signal.signal(number, signal.default_int_handler if in_a_shell else signal.SIG_DFL)

    usual = {}
    if threading.current_thread() is threading.main_thread():  # no other one gets signals
        numbers = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
                   if hasattr(signal, name)]  # Windows has no SIGHUP
        usual = {number: signal.signal(number, hold_back) for number in numbers
                 if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield held
    finally:
        for number, usual_handler in usual.items():
            signal.signal(number, usual_handler)


# The folder.


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
    try:
        refuse_gone(folder, lock)
    except OSError:
        lock.close()
        raise
    return lock


def refuse_gone(folder, lock):
    """OSError: the locked file is not the one any more that others find there, and try to lock."""
    try:
        is_there = os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except OSError:
        is_there = False
    if not is_there:
        raise OSError(f'--model_dir {folder}: it, or .lock in it, was removed or renamed while '
                      'this training used it, so nothing more is kept there; name another folder')


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
    ours = (CHECKPOINT, 'checkpoint.tmp', 'events.out.tfevents')
    systems = ('.', 'lost+found', '@eaDir', '$RECYCLE.BIN', 'System Volume Information',
               'desktop.ini', 'Thumbs.db')  # what disks, Windows and network storage put there
    others = [name for name in sorted(os.listdir(folder)) if not name.startswith(ours + systems)]
    if others and not checkpoints(folder):
        raise ValueError(f'--model_dir {folder}: it holds {others[0]}, and no checkpoint of this '
                         'network; name a new folder')


def make_ready(folder, lock):
    """Makes a claimed folder ready for checkpoints; OSError: nothing can be written there."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f'--model_dir {folder}: {error.strerror}') from error
    refuse_gone(folder, lock)
    remove_temporary_files(folder)  # those of a run that was killed while it saved


def remove_temporary_files(folder):
    """Removes what an unfinished save has left."""
    for path in glob.glob(f'{glob.escape(folder)}/{CHECKPOINT}-*.tempstate*'):
        if os.path.isfile(path):
            os.remove(path)


# TensorBoard.


class Events:
    """What TensorBoard shows of a training: its graph, its curves, and the mistakes in the end.

    A full disk is no reason to leave a trained network untested, so its error waits in `fault`.

    Args:
        folder: path of the folder.
        lock: what `claim` has returned for it.

    Attributes:
        fault: in one line, why nothing can be written any more; None as long as it can.
    """

    def __init__(self, folder, lock):
        self.folder, self.lock, self.writer, self.fault = folder, lock, None, None
        self.quiet = contextlib.ExitStack()

    def begin(self, step):
        """Writes that a training begins at this step; OSError: nothing can be written."""
        self.open(step)
        self.write('add_graph', tf.get_default_graph())
        # TensorBoard then forgets the later steps of a run that was killed.
        self.write('add_session_log', tf.SessionLog(status=tf.SessionLog.START), step)
        if self.fault:
            raise OSError(self.fault)

    def logged(self, accuracy, cross_entropy):
        """The accuracy, as a tensor whose evaluation also writes a summary of the training.

        Args:
            accuracy, cross_entropy: scalar tensors.
        """
        write = tf.py_func(lambda summary, step: self.write('add_summary', summary, step),
                           [training_summaries(accuracy, cross_entropy),
                            tf.train.get_global_step()], [])
        with tf.control_dependencies([write]):
            return tf.identity(accuracy)

    def write_mistakes(self, batches, x, y_, keep_prob, y_conv):
        """Writes the test images that the trained network gets wrong, each as
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
            self.open(step)
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

    def open(self, step):
        """Opens an event file: those of one second differ in the step that they begin with.

        OSError: the folder was removed.
        """
        refuse_gone(self.folder, self.lock)
        self.quiet.enter_context(quiet_writer())
        try:
            self.writer = tf.summary.FileWriter(self.folder, filename_suffix=f'.from_step_{step}')
        except (*FILE_ERRORS, OSError) as error:
            self.note(error)

    def write(self, method, *arguments):
        """Calls a method of tf.summary.FileWriter, by its name; its error becomes the fault."""
        if self.writer and not self.fault:
            try:
                getattr(self.writer, method)(*arguments)
            except (*FILE_ERRORS, OSError) as error:
                self.note(error)

    def note(self, error):
        """Notes an error, of which a full disk has several classes, as the fault."""
        self.fault = (f'--model_dir {self.folder}: nothing can be written for TensorBoard '
                      f'({reason(error)})')

    def close(self):
        """Writes what is still to be written."""
        self.write('close')
        self.quiet.close()


@contextlib.contextmanager
def quiet_writer():
    """Keeps off the screen what FileWriter's thread meets, say a full disk; `write` tells it."""
    usual, verbosity = threading.excepthook, tf.logging.get_verbosity()

    def hook(arguments):
        if arguments.thread.name != 'EventLoggerThread':
            usual(arguments)
    threading.excepthook = hook
    tf.logging.set_verbosity(tf.logging.FATAL)
    try:
        yield
    finally:
        threading.excepthook = usual
        tf.logging.set_verbosity(verbosity)


def training_summaries(accuracy, cross_entropy):
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


def has_mistakes(folder, step):
    """Whether TensorBoard has the images that the network got wrong after so many steps."""
    for path in glob.glob(f'{glob.escape(folder)}/events.out.tfevents.*'):
        with contextlib.suppress(tf.errors.OpError):  # the end of a run that was killed, say
            for event in tf.train.summary_iterator(path):
                if event.step == step and any(value.tag.startswith('mistakes/')
                                              for value in event.summary.value):
                    return True
    return False
