"""Trains the network of `mnist_deep.py` on many machines, by TensorFlow's own distributed runtime.

    python -m extras.replica --workers 2

trains with 2 workers and a parameter server on this machine. In a cluster, the same command without
--workers runs on each machine, and the environment variable TF_CONFIG tells each one its task:

    TF_CONFIG='{"cluster": {"ps": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222", "10.0.0.3:2222"]},
                "task": {"type": "worker", "index": 0}}' python -m extras.replica --model_dir model

The parameter servers (ps) hold the variables. Each worker has a copy of the graph, trains on
minibatches of its own, and sends its gradients; worker 0, the chief, also saves and evaluates.

TensorFlow's servers have no passwords, and listen on every network interface, even if the cluster
says 127.0.0.1: whoever reaches their ports can run programs on the machine. Use them only in a
network of your own, with these ports closed to others.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import input_data
import mnist_deep
import model_dir

tf = mnist_deep.tf


def main(argv=None):
    """Runs one task of the cluster, or with --workers all of them as processes on this machine.

    `argv` are the command line's flags, sys.argv's if None.

    Returns:
        The exit code; 0, or None, when the training is done.

    Raises:
        OSError, ValueError: the data or the folder cannot be used; a flag or TF_CONFIG is wrong.
        KeyboardInterrupt: Ctrl-C or SIGTERM; its text says what is kept.
    """
    flags = parse_flags(argv)
    if LOCAL in os.environ:
        end_with_parent()
    elif flags.workers:
        input_data.read_data_sets(flags.data_dir, seed=flags.seed)  # what is wrong is said once
        return run_local_cluster(flags.workers, sys.argv[1:] if argv is None else argv)
    cluster, job, index = read_tf_config()
    if job == 'worker' and not flags.model_dir and LOCAL not in os.environ:
        raise ValueError('--model_dir: a cluster needs a folder for its checkpoints, to go on from '
                         'when a machine fails')
    try:
        server = tf.train.Server(cluster, job_name=job, task_index=index)
    except tf.errors.OpError:
        raise OSError(f'{cluster.task_address(job, index)}, the address of {job} {index} in '
                      'TF_CONFIG, cannot be used: is it taken, or that of another machine?'
                      ) from None
    if job == 'ps':
        return serve(cluster, server, index)
    return watch(Worker(flags, cluster, server, index))


def serve(cluster, server, index):
    """A parameter server: holds its share of the variables until all workers are done."""
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    # Asked for its size: a dequeue with a timeout, now and then, loses what it gets.
    chief_is_done = done_queue(index).size()
    with tf.Session(server.target, config=reach_only('ps', index)) as sess:
        while not sess.run(chief_is_done) and not terminated.wait(0.1):
            pass
    # The others end after the step that they are at, however long it takes; those that are gone are
    # not waited for. At SIGTERM, which a whole cluster gets at once, the chief saves first.
    told = time.monotonic()
    while there := [at for at in cluster.job_tasks('worker') if not fault_at(at)]:
        if time.monotonic() > told + PATIENCE:
            told = time.monotonic()
            print(f'waiting for the end of the worker at {" and ".join(there)}', file=sys.stderr)
        time.sleep(0.2)
    return 128 + signal.SIGTERM if terminated.is_set() else 0


def work(worker):
    """A worker: trains its copy of the graph. Worker 0, the chief, also saves and evaluates."""
    flags, cluster, index, is_chief = worker.flags, worker.cluster, worker.index, worker.is_chief
    workers = cluster.num_tasks('worker')
    if flags.seed is not None:  # an order of minibatches, and a dropout, of its own
        flags.seed = (flags.seed + index) % 2**32
    tf.set_random_seed(flags.seed)
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=flags.seed)

    # The variables are placed on the parameter servers, all else on this worker.
    with tf.device(tf.train.replica_device_setter(
            cluster=cluster, worker_device=f'/job:worker/task:{index}')):
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_ = tf.placeholder(tf.float32, shape=[None, 10])
        y_conv, keep_prob = mnist_deep.deepnn(x)
        cross_entropy = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv))
        correct_prediction = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))

        optimizer = tf.train.AdamOptimizer(flags.learning_rate)
        if flags.sync_replicas:
            # Each step waits for the gradients of all workers, and takes their mean.
            optimizer = tf.train.SyncReplicasOptimizer(optimizer, workers, workers)
            worker.averaging = optimizer
        global_step = tf.train.get_or_create_global_step()
        with tf.name_scope('adam_optimizer'):
            train_step = optimizer.minimize(cross_entropy, global_step=global_step)
        with tf.control_dependencies([train_step]), tf.device(global_step.device):
            steps_done = global_step.read_value()  # there, after this step, not before
    all_is_done = [done_queue(ps).enqueue(True) for ps in range(cluster.num_tasks('ps'))]

    with tf.train.MonitoredSession(worker, [worker]) as sess:
        step = sess.run(global_step)
        if flags.seed is not None:  # in its order, each worker goes on after those of its steps
            for _ in range(step if flags.sync_replicas else step // workers):
                mnist.train.next_batch(flags.batch_size)
        if not is_chief and LOCAL not in os.environ:
            print(f'worker {index} joins at step {step}', file=sys.stderr)

        shown, stopped = -100, False
        while step < flags.max_steps and not stopped:
            batch = mnist.train.next_batch(flags.batch_size)
            if is_chief and step // 100 != shown // 100:
                shown = step
                train_accuracy = sess.run(accuracy, feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 1.0})
                print('step %d, training accuracy %g' % (step, train_accuracy), flush=True)
            step = sess.run([train_step, steps_done], feed_dict={
                x: batch[0], y_: batch[1], keep_prob: 0.5})[1]
            stopped = worker.stopped
            if worker.save_is_due(step, stopped):  # if a server is lost meanwhile, that is repeated
                step = sess.run_step_fn(lambda step_context: worker.save(step_context.session))

        if is_chief and not stopped:
            correct = 0
            for images, labels in mnist_deep.in_batches(mnist.test):
                correct += sess.run(correct_prediction, feed_dict={
                    x: images, y_: labels, keep_prob: 1.0}).sum()
            print('test accuracy %g' % (correct / mnist.test.num_examples), flush=True)
            sess.run(all_is_done)


# The tutorial ends here. The rest is for the cluster: sessions, checkpoints, waiting, TF_CONFIG,
# processes and flags.


class Worker(tf.train.SessionCreator, tf.train.SessionRunHook):
    """A worker's sessions, and the chief's checkpoints.

    TensorFlow asks for a session at the start, and again after a parameter server was lost.
    tf.train.MonitoredTrainingSession would look for the chief every 30 seconds only, which can be
    longer than a whole training, and would restore the newest checkpoint even if it is damaged.
    """

    def __init__(self, flags, cluster, server, index):
        self.flags, self.cluster, self.server, self.index = flags, cluster, server, index
        self.is_chief = index == 0
        self.saves = self.is_chief and flags.model_dir is not None
        self.session, self.joined = None, False  # the present one, and whether one has been there
        self.averaging = None  # tf.train.SyncReplicasOptimizer, with --sync_replicas
        self.heard = None  # when the servers gave an answer for the last time, by time.monotonic
        self.stopped = False  # whether this step is to be the last one
        self.saved = None  # how many steps the last checkpoint has
        if self.saves:
            self.lock = model_dir.claim(flags.model_dir)  # until this process ends
            model_dir.make_ready(flags.model_dir)

    def begin(self):
        """Called when the graph is complete. Checkpoints have the names of mnist_deep.py."""
        self.variables = {('adam_optimizer/' if v.op.name.startswith('beta') else '') + v.op.name: v
                          for v in tf.global_variables()}
        self.saver = tf.train.Saver(self.variables, max_to_keep=2, save_relative_paths=True)
        self.scaffold = tf.train.Scaffold(saver=self.saver)
        tf.logging.set_verbosity(tf.logging.FATAL)  # a lost server is told in one line, ours
        bfloat16 = self.flags.bfloat16 and (
            mnist_deep.computes_in_bfloat16() or self.is_chief or LOCAL not in os.environ)
        self.config = reach_only('worker', self.index, bfloat16)
        if self.averaging:  # a worker waits for a token, by which it learns that the step is done
            self.release_all = self.averaging.get_init_tokens_op(
                self.cluster.num_tasks('worker') - 1)
        self.heard = time.monotonic()

    def create_session(self):
        if self.joined:
            self.session = None
            print('a parameter server was lost; training goes on from the last checkpoint as soon '
                  'as it is back', file=sys.stderr)
        path = None
        if self.saves:
            path = model_dir.find_checkpoint(self.flags.model_dir, self.variables)
        self.scaffold.finalize()
        if self.is_chief:
            if self.averaging:
                with tf.Session(self.server.target, config=self.config) as session:
                    self.takes_over = not len(
                        session.run(self.scaffold.ready_for_local_init_op))
            self.session = tf.train.ChiefSessionCreator(
                self.scaffold, self.server.target, self.config,
                checkpoint_filename_with_path=path).create_session()
        else:
            self.session = tf.train.SessionManager(
                local_init_op=self.scaffold.local_init_op, ready_op=self.scaffold.ready_op,
                ready_for_local_init_op=self.scaffold.ready_for_local_init_op,
                recovery_wait_secs=1).wait_for_session(self.server.target, self.config)
        if path:
            model_dir.take_over_checkpoints(self.saver, path)
            self.saved = model_dir.steps_of(path)
            print(f'going on from step {self.saved} of {self.flags.max_steps}', file=sys.stderr)
        self.joined = True
        return self.session

    def after_create_session(self, session, coord):
        if self.averaging and self.is_chief:
            session.run(self.averaging.chief_init_op)
            if self.takes_over:  # the step at which the last chief, or session, ended is lost
                session.run(self.release_all)
            threading.Thread(target=self.average, args=(session,), daemon=True).start()
        elif self.averaging:
            session.run(self.averaging.local_step_init_op)

    def average(self, session):
        """With --sync_replicas: applies the mean of the workers' gradients, again and again.

        TensorFlow's own hook for this, when a connection breaks for a moment, closes a queue on the
        parameter server for good.
        """
        apply_mean, = self.averaging.get_chief_queue_runner().enqueue_ops
        with contextlib.suppress(tf.errors.OpError, RuntimeError):  # the session has been closed
            while True:
                session.run(apply_mean)

    def after_run(self, run_context, run_values):
        self.heard = time.monotonic()

    def save_is_due(self, step, stopped):
        """Whether the chief saves now, after `step` steps."""
        every = self.flags.save_checkpoints_steps
        return self.saves and (stopped or step >= self.flags.max_steps
                               or step // every > (self.saved or 0) // every)

    def save(self, session):
        """Saves a checkpoint, and returns the number of steps in it.

        OSError: it cannot be written.
        """
        prefix = os.path.join(self.flags.model_dir, model_dir.CHECKPOINT)
        try:
            path = self.saver.save(session, prefix, tf.train.get_global_step(session.graph),
                                   write_meta_graph=False)
        except (tf.errors.AbortedError, tf.errors.UnavailableError):
            raise  # a parameter server was lost
        except (tf.errors.OpError, OSError, RuntimeError) as error:
            raise OSError(f'--model_dir {self.flags.model_dir}: no checkpoint can be saved '
                          f'({model_dir.reason(error)}); those that are there are kept'
                          ) from error
        self.saved = model_dir.steps_of(path)
        return self.saved

    def faults(self):
        """The tasks without which this worker cannot go on, by name, and what is wrong there.

        Returns:
            dict, name and address -> OSError; None where somebody takes connections.
        """
        tasks = {f'the parameter server at {address}': address
                 for address in self.cluster.job_tasks('ps')}
        for i, address in enumerate(self.cluster.job_tasks('worker')):
            if i != self.index and (i == 0 or self.flags.sync_replicas):
                tasks[f'{"" if i else "the chief, "}worker {i} at {address}'] = address
        return {name: fault_at(address) for name, address in tasks.items()}

    def miss_the_end(self):
        """Ends a worker whose machine slept, say, while all others ended.

        OSError: by the checkpoints, which it may not see, the training is not done.
        """
        newest = model_dir.checkpoints(self.flags.model_dir)[:1]
        if not newest or model_dir.steps_of(newest[0]) < self.flags.max_steps:
            raise OSError('the parameter servers and the chief are gone: the training has ended, '
                          'or failed')


PATIENCE = 30  # seconds from one line to the next of a task that waits


def watch(worker):
    """Runs a worker in a thread. The main thread meanwhile tells what the worker waits for, and
    handles Ctrl-C and SIGTERM: a step may wait for ever, for a machine that is gone.
    """
    mnist_deep.handle_signals(stop)
    training = concurrent.futures.ThreadPoolExecutor(1).submit(work, worker)
    try:
        alone = 0
        while not ends_within(PATIENCE, training):
            faults = {}
            if worker.heard and time.monotonic() > worker.heard + PATIENCE:
                faults = worker.faults()
                gone = ' and '.join(f'{name} ({fault})' for name, fault in faults.items() if fault)
                print('waiting for', gone or f'an answer of {", or ".join(faults)}',
                      file=sys.stderr, flush=True)
            alone = alone + 1 if faults and all(faults.values()) else 0  # times in a row
            if alone == 10 and worker.joined and not worker.is_chief:
                return worker.miss_the_end()
        training.result()
    except KeyboardInterrupt as stopped:
        session = worker.session
        if worker.saves and session:
            worker.stopped = True
            if ends_within(10, training):  # it has saved, after its step
                training.result()
            else:
                with contextlib.suppress(tf.errors.AbortedError, tf.errors.UnavailableError):
                    worker.save(session)
        if worker.saved is not None:
            stopped.args = f'stopped at step {worker.saved}, kept in {worker.flags.model_dir}',
        raise


def ends_within(seconds, training):
    """Whether it ends in so many seconds.

    They are waited for in parts. A signal may reach any thread, and the main one, which handles it,
    then learns of it only when it goes on by itself.
    """
    end = time.monotonic() + seconds
    while not training.done() and time.monotonic() < end:
        concurrent.futures.wait([training], 0.1)
    return training.done()


def stop(number, _):
    """Handles a signal: ends what the main thread does. The second one ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    stopped = KeyboardInterrupt()
    stopped.exit_code = 128 + number
    raise stopped


def fault_at(address):
    """Why nobody takes connections at host:port, an OSError; None if somebody does."""
    host, port = address.rsplit(':', 1)
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    except OSError as error:
        return error


def reach_only(job, index, bfloat16=False):
    """A session's settings that make it wait for the parameter servers and itself, nobody else."""
    config = mnist_deep.session_config(bfloat16)
    config.device_filters.extend(['/job:ps', f'/job:{job}/task:{index}'])
    return config


def done_queue(ps):
    """The queue on a parameter server to which the chief adds True when all is done."""
    with tf.device(f'/job:ps/task:{ps}'):
        return tf.FIFOQueue(-1, tf.bool, shapes=[[]], shared_name=f'done_{ps}')


def read_tf_config():
    """This task, from TF_CONFIG; ValueError: that is missing or wrong.

    The format is that of TensorFlow's distributed training,
    https://www.tensorflow.org/guide/distributed_training#TF_CONFIG; the job "chief" is worker 0.
    (tf.distribute.cluster_resolver reads it, too, but takes 0.9 and true for an index.)

    Returns:
        cluster: tf.train.ClusterSpec of the jobs ps and worker.
        job: 'ps' or 'worker'.
        index: the task's number in its job, from 0 on.
    """
    text = os.environ.get('TF_CONFIG')
    if not text:
        raise ValueError('TF_CONFIG is not set: set it to a task of a cluster, as in --help, or '
                         'give --workers 2 for a cluster on this machine')
    try:
        config = json.loads(text)
        jobs, job, index = config['cluster'], config['task']['type'], config['task']['index']
        chiefs = jobs.get('chief', [])
        addresses = {'ps': jobs.get('ps', []), 'worker': chiefs + jobs.get('worker', [])}
        cluster = tf.train.ClusterSpec(addresses)
        for address in addresses['ps'] + addresses['worker']:
            if not 0 < int(address.rsplit(':', 1)[1]) < 65536:
                raise ValueError(address)
        sizes = {name: len(tasks) for name, tasks in jobs.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f'TF_CONFIG is {text!r}, expected JSON as in --help, with a cluster of '
                         f'"host:port" addresses and a task ({type(error).__name__}: {error})'
                         ) from None
    if not all(addresses.values()):
        raise ValueError(f'TF_CONFIG has the jobs {sorted(jobs)}, expected "ps" and "worker", each '
                         'with one address or more')
    if job == 'evaluator':
        raise ValueError(f'TF_CONFIG has the task {config["task"]}, but this training has no '
                         'evaluator: its chief evaluates')
    known = job in ('ps', 'chief', 'worker') and re.fullmatch('[0-9]+', str(index))
    if not known or int(index) >= sizes.get(job, 0):
        raise ValueError(f'TF_CONFIG has the task {config["task"]}, expected one of {sizes}, '
                         'counted from 0')
    if job == 'ps':
        return cluster, job, int(index)
    return cluster, 'worker', int(index) + (len(chiefs) if job == 'worker' else 0)


LOCAL = 'MNIST_REPLICA_LOCAL'  # in the environment of the processes that --workers starts


def run_local_cluster(workers, argv):
    """Runs a parameter server and workers as processes on this machine, to their end.

    They end when this process does, however that ends: each one reads a pipe from it. Returns the
    exit code.
    """
    tasks = [('ps', 0)] + [('worker', index) for index in range(workers)]
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in tasks]  # free ports
    addresses = [f'127.0.0.1:{free.getsockname()[1]}' for free in sockets]
    for free in sockets:
        free.close()
    cluster = {'ps': addresses[:1], 'worker': addresses[1:]}
    processes = {}
    try:
        for job, index in tasks:
            config = json.dumps({'cluster': cluster, 'task': {'type': job, 'index': index}})
            processes[f'{job} {index}'] = subprocess.Popen(
                [sys.executable, '-m', 'extras.replica', *argv], stdin=subprocess.PIPE,
                env={**os.environ, 'TF_CONFIG': config, LOCAL: '1'}, start_new_session=True)
        server, chief = processes['ps 0'], processes['worker 0']
        stopped = []

        def tell_chief(number, _):  # it saves, and says so; a second signal ends it at once
            stopped.append(number)
            chief.send_signal(number)
        mnist_deep.handle_signals(tell_chief)
        running = True
        while running:
            time.sleep(0.1)
            running = None in (server.poll(), chief.poll())
            for task, process in processes.items():
                if process.poll():
                    if stopped:
                        return 128 + stopped[0]
                    sys.exit(f'{task} has ended with code {process.returncode}, so all end')
    finally:
        for process in reversed(processes.values()):  # the workers first: none is to miss its ps
            process.kill()
            process.wait()


def end_with_parent():
    """Ends this process when the one that started it has ended."""
    def wait():
        os.read(0, 1)  # standard input is a pipe from there: this returns when it is closed
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines, and adds the defaults."""


def parse_flags(argv):
    """The flags; ValueError: one is out of range."""
    parser = mnist_deep.flag_parser(__doc__)
    parser.formatter_class = HelpFormatter
    parser.add_argument('--workers', type=int, metavar='N',
                        help='run a whole cluster on this machine: one ps, N workers')
    parser.add_argument('--sync_replicas', action='store_true',
                        help="average all workers' gradients for each step")
    flags = mnist_deep.checked(parser.parse_args(argv))
    if flags.workers is not None and flags.workers < 1:
        raise ValueError(f'argument --workers: {flags.workers} is not a number above 0')
    if flags.seed is not None and not 0 <= flags.seed < 2**32:
        raise ValueError(f'argument --seed: {flags.seed} is not from 0 to {2**32 - 1}')
    return flags


if __name__ == '__main__':
    # At once: a thread of TensorFlow's may still wait for a machine that is gone.
    os._exit(mnist_deep.run(main) or 0)
