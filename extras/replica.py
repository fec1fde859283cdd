"""Trains the network of `mnist_deep.py` on many machines.

    python -m extras.replica --workers 2

trains with 2 workers and a parameter server on this machine, as threads of one
process. In a cluster, the same command without --workers runs on each machine,
and the environment variable TF_CONFIG tells each one its task:

    TF_CONFIG='{"cluster": {"ps": ["10.0.0.1:2222"],
                            "worker": ["10.0.0.2:2222", "10.0.0.3:2222"]},
                "task": {"type": "worker", "index": 0}}' \\
    python -m extras.replica --model_dir model

The parameter servers (ps) hold the variables. Each worker has a copy of the
graph, trains on minibatches of its own, and sends its gradients; worker 0, the
chief, also saves and evaluates.

TensorFlow's servers have no passwords, and listen on every network interface,
even if the cluster says 127.0.0.1: whoever reaches their ports can run programs
on the machine. Use them only in a network of your own, with these ports closed
to others.
"""

import argparse
import concurrent.futures
import contextlib
import os
import signal
import socket
import sys
import threading
import time

import input_data
import mnist_deep
import model_dir

tf = mnist_deep.tf


def main(argv=None):
    """Runs one task of the cluster, or with --workers all of them, in threads of this process.

    `argv` are the command line's flags, sys.argv's if None. Returns the exit code.

    Raises:
        OSError, ValueError: the data or the folder cannot be used; a flag or TF_CONFIG is wrong.
        KeyboardInterrupt: a signal ended the training; its text says what is kept.
    """
    flags = parse_flags(argv)
    if flags.workers:
        cluster = local_cluster(flags.workers)
        tasks = [('ps', 0)] + [('worker', index) for index in range(flags.workers)]
    else:
        cluster, job, index = read_tf_config()
        tasks = [(job, index)]
        if job == 'worker' and not flags.model_dir:
            raise ValueError('--model_dir: a cluster needs a folder for its checkpoints, to go on '
                             'from when a machine fails')
    reach_without_proxy(cluster)
    servers = [start_server(cluster, *task) for task in tasks]
    config = mnist_deep.session_config(flags.bfloat16)
    workers = [Worker(flags, cluster, server, number, config)
               for server, (kind, number) in zip(servers, tasks) if kind == 'worker']
    return watch(workers) if workers else serve(cluster, servers[0], index)


def serve(cluster, server, index):
    """A parameter server: holds its share of the variables until all workers are done."""
    terminated = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
    # Asked for its size: a dequeue with a timeout, now and then, loses what it gets.
    chief_is_done = done_queue(index).size()
    with tf.Session(server.target, config=reach_only(tf.ConfigProto(), 'ps', index)) as sess:
        while not sess.run(chief_is_done) and not terminated.wait(0.1):
            pass
    # The workers may still be in a step. At SIGTERM, which a whole cluster gets at once, the chief
    # saves first.
    end = time.monotonic() + PATIENCE
    while any(map(answers, cluster.job_tasks('worker'))) and time.monotonic() < end:
        time.sleep(0.2)
    return 128 + signal.SIGTERM if terminated.is_set() else 0


def work(worker):
    """A worker: trains its copy of the graph. Worker 0, the chief, also saves and evaluates."""
    flags, cluster, index = worker.flags, worker.cluster, worker.index
    workers, seed = cluster.num_tasks('worker'), flags.seed
    if seed is not None:  # an order of minibatches, and a dropout, of its own
        seed = (seed + index) % 2**32
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=seed)

    # The variables are placed on the parameter servers, all else on this worker.
    with tf.Graph().as_default(), tf.device(tf.train.replica_device_setter(
            cluster=cluster, worker_device=f'/job:worker/task:{index}')):
        tf.set_random_seed(seed)
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
            if seed is not None:  # in its order, each worker goes on after those of its steps
                for _ in range(step if flags.sync_replicas else step // workers):
                    mnist.train.next_batch(flags.batch_size)
            if index > 0 and not flags.workers:
                print(f'worker {index} joins at step {step}', file=sys.stderr)

            shown, stopped = -100, False
            while step < flags.max_steps and not stopped:
                batch = mnist.train.next_batch(flags.batch_size)
                if index == 0 and step // 100 != shown // 100:
                    shown = step
                    train_accuracy = sess.run(accuracy, feed_dict={
                        x: batch[0], y_: batch[1], keep_prob: 1.0})
                    print('step %d, training accuracy %g' % (step, train_accuracy), flush=True)
                step = sess.run([train_step, steps_done], feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 0.5})[1]
                stopped = worker.stopped
                if worker.save_is_due(step, stopped):  # again, if a server is lost meanwhile
                    step = sess.run_step_fn(worker.save)

            if index == 0 and not stopped:
                correct = 0
                for images, labels in mnist_deep.in_batches(mnist.test):
                    correct += sess.run(correct_prediction, feed_dict={
                        x: images, y_: labels, keep_prob: 1.0}).sum()
                print('test accuracy %g' % (correct / mnist.test.num_examples), flush=True)
                sess.run(all_is_done)


# The tutorial ends here. The rest is for the cluster: sessions, checkpoints, waiting, addresses,
# TF_CONFIG and flags.


class Worker(tf.train.SessionCreator, tf.train.SessionRunHook):
    """A worker's sessions, and the chief's checkpoints.

    TensorFlow asks for a session at the start, and again after a parameter server was lost.
    tf.train.MonitoredTrainingSession would look for the chief every 30 seconds only, which can be
    longer than a whole training, and would restore the newest checkpoint even if it is damaged.
    """

    def __init__(self, flags, cluster, server, index, config):
        self.flags, self.cluster, self.server, self.index = flags, cluster, server, index
        self.config = reach_only(config, 'worker', index)
        self.saves = index == 0 and flags.model_dir is not None
        self.session = self.checkpoints = None
        self.averaging = None  # tf.train.SyncReplicasOptimizer, with --sync_replicas
        self.heard = None  # when the servers gave an answer for the last time, by time.monotonic
        self.stopped = False  # whether this step is to be the last one
        if self.saves:
            self.lock = model_dir.claim(flags.model_dir)  # until this process ends
            model_dir.make_ready(flags.model_dir)

    def begin(self):
        """Called when the graph is complete. Checkpoints have the names of mnist_deep.py."""
        self.checkpoints = model_dir.Checkpoints(self.flags.model_dir, {
            ('adam_optimizer/' if v.op.name.startswith('beta') else '') + v.op.name: v
            for v in tf.global_variables()})
        self.scaffold = tf.train.Scaffold(saver=self.checkpoints.saver)
        tf.logging.set_verbosity(tf.logging.FATAL)  # a lost server is told in one line, ours
        if self.averaging:  # a worker waits for a token, by which it learns that the step is done
            self.release_all = self.averaging.get_init_tokens_op(
                self.cluster.num_tasks('worker') - 1)
        self.heard = time.monotonic()

    def create_session(self):
        if self.session:
            self.session = None
            print('a parameter server was lost; training goes on from the last checkpoint as soon '
                  'as it is back', file=sys.stderr)
        path = self.checkpoints.find() if self.saves else None
        self.scaffold.finalize()
        if self.index == 0:
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
            print(f'going on from step {self.checkpoints.saved} of {self.flags.max_steps}',
                  file=sys.stderr)
        return self.session

    def after_create_session(self, session, coord):
        if self.averaging and self.index == 0:
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
        every, saved = self.flags.save_checkpoints_steps, self.checkpoints.saved
        return self.saves and (stopped or step >= self.flags.max_steps
                               or step // every > saved // every)

    def save(self, step_context):
        """Saves a checkpoint, and returns the number of steps in it."""
        # Done again after a server was lost, step_context would still have the session of before.
        self.checkpoints.save(self.session)
        return self.checkpoints.saved

    def needs(self):
        """The tasks without which this worker cannot go on: dict, name and address -> address."""
        tasks = {f'the parameter server at {address}': address
                 for address in self.cluster.job_tasks('ps')}
        for i, address in enumerate(self.cluster.job_tasks('worker')):
            if i != self.index and (i == 0 or self.flags.sync_replicas):
                tasks[f'{"" if i else "the chief, "}worker {i} at {address}'] = address
        return tasks


PATIENCE = 30  # seconds from one line to the next of a task that waits
LAST_LINE = 10  # after so many, a worker that finds nobody at all gives up


def watch(workers):
    """Runs this process's workers in threads, until the first one is done. The main thread tells
    meanwhile what that one waits for, and handles signals: a step may wait for ever, for a machine
    that is gone. Returns the exit code.
    """
    worker = workers[0]
    pool = concurrent.futures.ThreadPoolExecutor(len(workers))
    with model_dir.signals_handled(stop):
        trainings = [pool.submit(work, each) for each in workers]
        try:
            alone = 0  # how many times in a row
            while not ends_within(PATIENCE, trainings):
                if not worker.heard or time.monotonic() < worker.heard + PATIENCE:
                    continue
                needs = worker.needs()
                gone = [name for name, address in needs.items() if not answers(address)]
                print('waiting for', ' and '.join(gone) or f'an answer of {", or ".join(needs)}',
                      file=sys.stderr, flush=True)
                alone = alone + 1 if len(gone) == len(needs) else 0
                if alone and is_trained(worker.flags):
                    return end_alone(worker)
                if alone == LAST_LINE and worker.index > 0:
                    raise OSError('the parameter servers and the chief are gone: the training has '
                                  'ended, or failed')
        except KeyboardInterrupt as stopped:
            for each in workers:
                each.stopped = True
            session = worker.session  # none while a parameter server is gone
            if worker.saves and session and not ends_within(10, trainings):  # else it has saved
                with contextlib.suppress(tf.errors.AbortedError, tf.errors.UnavailableError,
                                         RuntimeError):  # or it was closed meanwhile
                    worker.checkpoints.save(session)
            if worker.saves and worker.checkpoints and worker.checkpoints.saved:
                stopped.args = (f'stopped at step {worker.checkpoints.saved}, kept in '
                                f'{worker.flags.model_dir}'),
            raise
        finally:
            if worker.saves:
                worker.lock.close()
    return 0


def is_trained(flags):
    """Whether the folder has the checkpoint of the last step."""
    newest = model_dir.checkpoints(flags.model_dir)[:1] if flags.model_dir else []
    return bool(newest) and model_dir.steps_of(newest[0]) >= flags.max_steps


def end_alone(worker):
    """Ends a task that was started again, or woke, when the training was over and all others gone.

    The chief tests the network, as `mnist_deep.py` does. Returns the exit code.
    """
    if worker.index == 0:
        worker.lock.close()  # for the test takes it
        with tf.Graph().as_default():
            mnist_deep.train(worker.flags)
    else:
        path = model_dir.checkpoints(worker.flags.model_dir)[0]
        print(f'trained for {model_dir.steps_of(path)} steps already', file=sys.stderr)
    return 0


def ends_within(seconds, trainings):
    """Whether the first one ends in so many seconds; raises what any of them has raised.

    They are waited for in parts. A signal may reach any thread, and the main one, which handles it,
    then learns of it only when it goes on by itself.
    """
    end = time.monotonic() + seconds
    while not trainings[0].done() and time.monotonic() < end:
        for training in concurrent.futures.wait(trainings, 0.1).done:
            training.result()
    return trainings[0].done() and trainings[0].result() is None


def stop(number, _):
    """Handles a signal: ends what the main thread does. The second one ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise model_dir.Stopped(number)


def start_server(cluster, job, index):
    """A task's server; OSError: its address cannot be used."""
    try:
        return tf.train.Server(cluster, job_name=job, task_index=index)
    except tf.errors.OpError as error:
        raise OSError(f'{cluster.task_address(job, index)}, the address of {job} {index}, cannot '
                      f'be used: is its port taken? ({model_dir.reason(error)})') from None


def answers(address):
    """Whether somebody takes connections at host:port."""
    host, port = address.rsplit(':', 1)
    try:
        socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def reach_only(config, job, index):
    """A session's settings: it waits for the parameter servers and itself alone."""
    limited = tf.ConfigProto()
    limited.CopyFrom(config)
    limited.device_filters.extend(['/job:ps', f'/job:{job}/task:{index}'])
    return limited


def reach_without_proxy(cluster):
    """Lets gRPC reach the cluster directly: it would ask a web proxy, and wait for ever for that.

    https://github.com/grpc/grpc/blob/master/doc/environment_variables.md
    """
    hosts = [address.rsplit(':', 1)[0].strip('[]')
             for addresses in cluster.as_dict().values() for address in addresses]
    usual = os.environ.get('no_grpc_proxy') or os.environ.get('no_proxy')
    os.environ['no_grpc_proxy'] = ','.join([usual] * bool(usual) + hosts)


def done_queue(ps):
    """The queue on a parameter server to which the chief adds True when all is done."""
    with tf.device(f'/job:ps/task:{ps}'):
        return tf.FIFOQueue(-1, tf.bool, shapes=[[]], shared_name=f'done_{ps}')


def local_cluster(workers):
    """A tf.train.ClusterSpec of one parameter server and so many workers, on free ports."""
    free = [socket.create_server(('127.0.0.1', 0)) for _ in range(1 + workers)]
    addresses = [f'127.0.0.1:{bound.getsockname()[1]}' for bound in free]
    for bound in free:
        bound.close()
    return tf.train.ClusterSpec({'ps': addresses[:1], 'worker': addresses[1:]})


def read_tf_config():
    """This task, from TF_CONFIG; ValueError: that is missing or wrong.

    The format is that of TensorFlow's distributed training,
    https://www.tensorflow.org/guide/distributed_training#TF_CONFIG; the job "chief", or "master"
    as it was called before, is worker 0.

    Returns:
        cluster: tf.train.ClusterSpec of the jobs ps and worker.
        job: 'ps' or 'worker'.
        index: the task's number in its job, from 0 on.
    """
    text = os.environ.get('TF_CONFIG')
    if not text:
        raise ValueError('TF_CONFIG is not set: set it to the cluster and this task, as in --help, '
                         'or give --workers 2 for a cluster on this machine')
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        jobs, job, index = resolver.cluster_spec().as_dict(), resolver.task_type, resolver.task_id
        chiefs = jobs.get('chief', []) + jobs.get('master', [])
        if job in ('chief', 'master'):
            job = 'worker'
        elif job == 'worker':
            index += len(chiefs)
        cluster = tf.train.ClusterSpec({'ps': jobs['ps'],
                                        'worker': chiefs + jobs.get('worker', [])})
        cluster.task_address(job, index)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'TF_CONFIG is {text!r}, expected JSON as in --help: a cluster of '
                         '"host:port" addresses with the jobs "ps" and "worker", and a task in it '
                         f'({type(error).__name__}: {error})') from None
    return cluster, job, index


def parse_flags(argv):
    """The flags; ValueError: one is out of range."""
    parser = mnist_deep.flag_parser(__doc__)
    parser.usage = 'python -m extras.replica [flags]'
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument('--workers', type=int, metavar='N',
                        help='run a whole cluster on this machine: one ps, N workers')
    parser.add_argument('--sync_replicas', action='store_true',
                        help="average all workers' gradients for each step")
    flags = mnist_deep.checked(parser.parse_args(argv))
    if flags.workers is not None and flags.workers < 1:
        raise ValueError(f'argument --workers: {flags.workers} is not a number above 0')
    return flags


def run():
    """Runs main as a script does, and ends the process at once, whatever main has raised.

    Python would wait for the other threads, and one of them may wait for a machine that is gone.
    """
    code = 1
    try:
        code = mnist_deep.run(main) or 0
    except Exception:  # such as a broken pipe, where nobody takes the lines any more
        sys.excepthook(*sys.exc_info())
    os._exit(code)


if __name__ == '__main__':
    run()
