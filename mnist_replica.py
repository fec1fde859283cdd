"""Trains the network of `mnist_deep.py` on many machines, by TensorFlow's own distributed runtime.

    python mnist_replica.py --workers 2

trains with 2 workers and a parameter server on this machine. In a cluster, the same command without
--workers runs on each machine, and the environment variable TF_CONFIG tells each one its task:

    TF_CONFIG='{"cluster": {"ps": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222", "10.0.0.3:2222"]},
                "task": {"type": "worker", "index": 0}}' python mnist_replica.py --model_dir model

The parameter servers (ps) hold the variables. Each worker has a copy of the graph, trains on
minibatches of its own, and sends its gradients; worker 0, the chief, also saves and evaluates.

TensorFlow's servers have no passwords, and listen on every network interface, even if the cluster
says 127.0.0.1: whoever reaches their ports can run programs on the machine. Use them only in a
network of your own, with these ports closed to others.
"""

import argparse
import contextlib
import json
import os
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

    OSError, ValueError: the data or the folder cannot be used; a flag or TF_CONFIG is wrong.
    """
    flags = parse_flags(argv)
    if os.environ.get(LOCAL):
        end_with_parent()
    elif flags.workers:
        input_data.read_data_sets(flags.data_dir, seed=flags.seed)  # what is wrong is said once
        return run_local_cluster(flags.workers, sys.argv[1:] if argv is None else argv)
    elif not flags.model_dir:
        raise ValueError('--model_dir: a cluster needs a folder for its checkpoints, to go on from '
                         'when a machine fails')
    cluster, job, index = read_tf_config()
    try:
        server = tf.train.Server(cluster, job_name=job, task_index=index,
                                 config=mnist_deep.session_config(flags.bfloat16))
    except tf.errors.OpError:
        raise OSError(f'{cluster.task_address(job, index)}, the address of {job} {index} in '
                      'TF_CONFIG, cannot be used: is it taken, or that of another machine?'
                      ) from None
    with tf.Graph().as_default():
        if job == 'ps':
            return serve(cluster, server, index)
        return work(flags, cluster, server, index)


def serve(cluster, server, index):
    """A parameter server: holds its share of the variables until all workers are done."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to be saved here
    one_is_done = done_queue(cluster, index).dequeue()
    with tf.Session(server.target, config=reach_only('ps', index)) as sess:
        done = []
        while 0 not in done:  # the chief is the last one that matters
            done.append(sess.run(one_is_done))
        # The others end with the same step; one that is gone for good is not waited for.
        missing = cluster.num_tasks('worker') - len(done)
        others = threading.Thread(
            target=lambda: [sess.run(one_is_done) for _ in range(missing)], daemon=True)
        others.start()
        others.join(timeout=10)
        os._exit(0)  # at once: the session may still be waiting for a worker that is gone


def work(flags, cluster, server, index):
    """A worker: trains its copy of the graph. Worker 0, the chief, also saves and evaluates."""
    is_chief = index == 0
    if flags.seed is not None:
        flags.seed += index  # an order of minibatches, and a dropout, of its own
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

        optimizer, hooks = tf.train.AdamOptimizer(flags.learning_rate), []
        if flags.sync_replicas:
            # Each step waits for the gradients of all workers, and takes their mean.
            workers = cluster.num_tasks('worker')
            optimizer = tf.train.SyncReplicasOptimizer(optimizer, workers, workers)
            hooks.append(optimizer.make_session_run_hook(is_chief, num_tokens=0))
            threading.excepthook = quiet_when_cancelled
            tf.logging.set_verbosity(tf.logging.FATAL)  # a lost server is told in one line, ours
        global_step = tf.train.get_or_create_global_step()
        with tf.name_scope('adam_optimizer'):
            train_step = optimizer.minimize(cross_entropy, global_step=global_step)
        with tf.control_dependencies([train_step]), tf.device(global_step.device):
            steps_done = global_step.read_value()  # there, after this step, not before
    i_am_done = [done_queue(cluster, ps).enqueue(index) for ps in range(cluster.num_tasks('ps'))]

    scaffold, savers, resumes = checkpoints(flags, is_chief)
    interrupt = Interrupt()
    creator = PatientSessionCreator(cluster, server, index, flags, scaffold)
    with tf.train.MonitoredSession(creator, hooks + savers, stop_grace_period_secs=1) as sess:
        step = sess.run(global_step)
        if resumes:
            print(f'going on from step {step} of {flags.max_steps}', file=sys.stderr)
        elif not is_chief and not os.environ.get(LOCAL):
            print(f'worker {index} joins at step {step}', file=sys.stderr)
        shown = -100
        while step < flags.max_steps and not interrupt.pressed:
            batch = mnist.train.next_batch(flags.batch_size)
            if is_chief and step // 100 != shown // 100:
                shown = step
                train_accuracy = sess.run(accuracy, feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 1.0})
                print('step %d, training accuracy %g' % (step, train_accuracy), flush=True)
            step = sess.run([train_step, steps_done], feed_dict={
                x: batch[0], y_: batch[1], keep_prob: 0.5})[1]

        if is_chief and not interrupt.pressed:
            correct = 0
            try:
                for images, labels in mnist_deep.in_batches(mnist.test):
                    correct += sess.run(correct_prediction, feed_dict={
                        x: images, y_: labels, keep_prob: 1.0}).sum()
                print('test accuracy %g' % (correct / mnist.test.num_examples), flush=True)
            except KeyboardInterrupt:
                interrupt.pressed = True  # the session's end saves the network first
    if interrupt.pressed:
        kept = f', kept in {flags.model_dir}' if is_chief and flags.model_dir else ''
        raise KeyboardInterrupt(f'stopped at step {step}{kept}')
    with tf.Session(server.target, config=reach_only('worker', index)) as sess:
        for one_knows in i_am_done:
            try:
                sess.run(one_knows)
            except tf.errors.UnavailableError:
                pass  # that server knew, and ended before its answer came


# The tutorial ends here. The rest is for the cluster: checkpoints, sessions, TF_CONFIG, processes
# and flags.


def checkpoints(flags, is_chief):
    """What restores and saves the network; to be called when the graph is complete.

    Returns:
        scaffold: tf.train.Scaffold, whose saver gives the checkpoints the names of mnist_deep.py.
        hooks: list, the hook that saves; empty for those who don't.
        resumes: whether there is a checkpoint to go on from.
    """
    variables = {('adam_optimizer/' if v.op.name.startswith('beta') else '') + v.op.name: v
                 for v in tf.global_variables()}
    scaffold = tf.train.Scaffold(saver=tf.train.Saver(
        variables, max_to_keep=2, save_relative_paths=True))
    if not is_chief or not flags.model_dir:
        return scaffold, [], False
    model_dir.claim(flags.model_dir)
    resumes = model_dir.find_checkpoint(flags.model_dir, variables) is not None
    hook = tf.train.CheckpointSaverHook(
        flags.model_dir, save_steps=flags.save_checkpoints_steps, scaffold=scaffold,
        checkpoint_basename=model_dir.CHECKPOINT, save_graph_def=False)
    return scaffold, [hook], resumes


class PatientSessionCreator(tf.train.SessionCreator):
    """Creates a worker's session, at the start and again after a parameter server was lost.

    The chief initialises the variables, or restores the newest checkpoint; the other workers wait
    for that. tf.train.MonitoredTrainingSession would let them look every 30 seconds only, which can
    be longer than a whole training.
    """

    def __init__(self, cluster, server, index, flags, scaffold):
        self.cluster, self.is_chief, self.scaffold = cluster, index == 0, scaffold
        self.created = False
        self.session = {'master': server.target,
                        'config': reach_only('worker', index, flags.bfloat16)}
        self.chief = tf.train.ChiefSessionCreator(scaffold, checkpoint_dir=flags.model_dir,
                                                  **self.session)

    def create_session(self):
        if self.created:
            print('a parameter server was lost; training goes on from the last checkpoint as soon '
                  'as it is back', file=sys.stderr)
        self.created = True
        servers = self.cluster.job_tasks('ps')
        awaited = f'an answer of the parameter server at {" and ".join(servers)}'
        if not self.is_chief:
            awaited += f', or the chief, worker 0 at {self.cluster.task_address("worker", 0)}'
        press = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to save now
        try:
            for address in servers:
                wait_for_server(address)
            with telling_what_is_awaited(lambda: awaited):
                if self.is_chief:
                    return self.chief.create_session()
                self.scaffold.finalize()
                return tf.train.SessionManager(
                    local_init_op=self.scaffold.local_init_op, ready_op=self.scaffold.ready_op,
                    ready_for_local_init_op=self.scaffold.ready_for_local_init_op,
                    recovery_wait_secs=1).wait_for_session(**self.session)
        finally:
            signal.signal(signal.SIGINT, press)


def wait_for_server(address):
    """Returns as soon as something listens at host:port."""
    host, port = address.rsplit(':', 1)
    reason = None
    with telling_what_is_awaited(lambda: f'the parameter server at {address} ({reason})'):
        while True:
            try:
                return socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                reason = error
            time.sleep(0.5)


PATIENCE = 30  # seconds from one line to the next of a task that waits


@contextlib.contextmanager
def telling_what_is_awaited(what):
    """Says on standard error, again and again, what is awaited, until the block is done."""
    done = threading.Event()

    def tell():
        while not done.wait(PATIENCE):
            print(f'waiting for {what()}', file=sys.stderr, flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def reach_only(job, index, bfloat16=False):
    """A session's settings that make it wait for the parameter servers and itself, nobody else."""
    config = mnist_deep.session_config(bfloat16)
    config.device_filters.extend(['/job:ps', f'/job:{job}/task:{index}'])
    return config


def done_queue(cluster, ps):
    """The queue on a parameter server to which each worker adds its number when it is done."""
    with tf.device(f'/job:ps/task:{ps}'):
        return tf.FIFOQueue(cluster.num_tasks('worker'), tf.int32, shapes=[[]],
                            shared_name=f'done_{ps}')


def quiet_when_cancelled(error):
    """Reports a thread's error, but not that of SyncReplicasOptimizer's at the end.

    Its thread still waits for gradients when the session is closed, and would show a traceback.
    """
    if not issubclass(error.exc_type, tf.errors.CancelledError):
        threading.__excepthook__(error)


class Interrupt:
    """Holds Ctrl-C back until a step is done; pressed again, it ends the process at once."""

    def __init__(self):
        self.pressed = False
        signal.signal(signal.SIGINT, self.press)

    def press(self, *_):
        self.pressed = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def read_tf_config():
    """This task, from TF_CONFIG; ValueError: that is missing or wrong.

    The format is that of TensorFlow's distributed training,
    https://www.tensorflow.org/guide/distributed_training#TF_CONFIG; the job "chief" is worker 0.

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
        workers = jobs.get('chief', []) + jobs.get('worker', [])
        if job == 'worker':
            index += len(jobs.get('chief', []))
        elif job == 'chief':
            job = 'worker'
        addresses = {'ps': jobs.get('ps', []), 'worker': workers}
        for address in [*addresses['ps'], *workers]:
            if not 0 < int(address.rsplit(':', 1)[1]) < 65536:
                raise ValueError(address)
        if config['task']['type'] not in jobs:
            job = None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f'TF_CONFIG is {text!r}, expected JSON as in --help, with a cluster of '
                         f'"host:port" addresses and a task ({type(error).__name__}: {error})'
                         ) from None
    if not addresses['ps'] or not workers:
        raise ValueError(f'TF_CONFIG has the jobs {sorted(jobs)}, expected "ps" and "worker", each '
                         'with one address or more')
    if job not in addresses or not 0 <= config['task']['index'] < len(addresses[job]) > index:
        raise ValueError(f'TF_CONFIG has the task {config["task"]}, expected one of '
                         f'{ {name: len(tasks) for name, tasks in jobs.items()} }, counted from 0')
    return tf.train.ClusterSpec(addresses), job, index


LOCAL = 'MNIST_REPLICA_LOCAL'  # in the environment of the processes that --workers starts


def run_local_cluster(workers, argv):
    """Runs a parameter server and workers as processes on this machine, to their end.

    They end when this process does, however that ends: each one reads a pipe from it.
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
            processes[job, index] = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), *argv], stdin=subprocess.PIPE,
                env={**os.environ, 'TF_CONFIG': config, LOCAL: '1'}, start_new_session=True)
        running = True
        while running:
            time.sleep(0.1)
            running = None in [process.poll() for process in processes.values()]
            for (job, index), process in processes.items():
                if process.returncode:
                    sys.exit(f'{job} {index} has ended with code {process.returncode}, so all end')
    except KeyboardInterrupt:
        chief = processes.get(('worker', 0))
        if chief:
            chief.send_signal(signal.SIGINT)
            chief.wait(60)  # it saves, and says so
        sys.exit(130)
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
    return flags


if __name__ == '__main__':
    sys.exit(mnist_deep.run(main))
