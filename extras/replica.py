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
import re
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
    # Asked for its size: a dequeue with a timeout, now and then, loses what it gets.
    chief_is_done = done_queue(index).size()
    with model_dir.signals_held_back() as signals:
        with tf.Session(server.target, config=reach_only(tf.ConfigProto(), 'ps', index)) as sess:
            while not sess.run(chief_is_done) and not signals:
                time.sleep(0.1)
        # The workers may still be in a step. At a signal, which a whole cluster gets at once, the
        # chief saves first.
        end = time.monotonic() + PATIENCE
        while any(map(answers, cluster.job_tasks('worker'))) and time.monotonic() < end:
            time.sleep(0.2)
    if signals:
        raise model_dir.Stopped(signals[0])
    return 0


def work(worker):
    """A worker: trains its copy of the graph. Worker 0, the chief, also saves and evaluates."""
    flags = worker.flags
    mnist = input_data.read_data_sets(flags.data_dir, one_hot=True, seed=worker.seed)

    # The variables are placed on the parameter servers, all else on this worker.
    with tf.Graph().as_default(), tf.device(worker.placement()):
        tf.set_random_seed(worker.seed)

        # Create the model
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_ = tf.placeholder(tf.float32, shape=[None, 10])
        y_conv, keep_prob = mnist_deep.deepnn(x)

        # Define loss and optimizer
        cross_entropy = tf.reduce_mean(
            tf.nn.softmax_cross_entropy_with_logits(labels=y_, logits=y_conv))
        correct_prediction = tf.equal(tf.argmax(y_conv, 1), tf.argmax(y_, 1))
        accuracy = tf.reduce_mean(tf.cast(correct_prediction, tf.float32))
        optimizer = worker.optimizer()
        global_step = tf.train.get_or_create_global_step()
        with tf.name_scope('adam_optimizer'):
            train_step = optimizer.minimize(cross_entropy, global_step=global_step)
        with tf.control_dependencies([train_step]), tf.device(global_step.device):
            steps_done = global_step.read_value()  # there, after this step, not before
        tell_servers = worker.tell_servers()

        with tf.train.MonitoredSession(worker, [worker]) as sess, worker.saving_on_error(sess):
            step = sess.run(global_step)
            worker.skip_used_batches(step, mnist.train)
            if not worker.is_chief and not flags.workers:
                print(f'worker {worker.index} joins at step {step}', file=sys.stderr)

            # Train
            shown, stopping = -100, False
            while step < flags.max_steps and not stopping:
                batch = mnist.train.next_batch(flags.batch_size)
                if worker.is_chief and step // 100 != shown // 100:
                    shown = step
                    train_accuracy = sess.run(accuracy, feed_dict={
                        x: batch[0], y_: batch[1], keep_prob: 1.0})
                    print('step %d, training accuracy %g' % (step, train_accuracy), flush=True)
                step = sess.run([train_step, steps_done], feed_dict={
                    x: batch[0], y_: batch[1], keep_prob: 0.5})[1]
                stopping = worker.stopping.is_set()
                if worker.save_is_due(step, stopping):  # again, if a server is lost meanwhile
                    step = sess.run_step_fn(worker.save)

            # Test the trained network
            if worker.is_chief and not stopping:
                correct = 0
                for images, labels in mnist_deep.in_batches(mnist.test):
                    correct += sess.run(correct_prediction, feed_dict={
                        x: images, y_: labels, keep_prob: 1.0}).sum()
                print('test accuracy %g' % (correct / mnist.test.num_examples), flush=True)
                sess.run(tell_servers)


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
        self.is_chief = index == 0
        self.seed = flags.seed  # an order of minibatches, and a dropout, of its own
        if self.seed is not None:
            self.seed = (self.seed + index) % 2**32
        self.config = reach_only(config, 'worker', index)
        self.checkpoints = None
        self.averaging = None  # tf.train.SyncReplicasOptimizer, with --sync_replicas
        self.lock = None  # of the chief's folder, until this process ends
        if self.is_chief and flags.model_dir is not None:
            self.lock = model_dir.claim(flags.model_dir)
            model_dir.make_ready(flags.model_dir, self.lock)

        # What this worker's thread and the main one share.
        self.session = None  # also while a parameter server is gone
        self.heard = None  # when the servers gave an answer for the last time, by time.monotonic
        self.stopping = threading.Event()  # set, this step is to be the last one

    # What `work` adds to the tutorial.

    def placement(self):
        """The function that tells on which machine an operation is."""
        return tf.train.replica_device_setter(
            cluster=self.cluster, worker_device=f'/job:worker/task:{self.index}')

    def optimizer(self):
        """Adam; with --sync_replicas, each step waits for the gradients of all workers, and takes
        their mean.
        """
        adam = tf.train.AdamOptimizer(self.flags.learning_rate)
        if not self.flags.sync_replicas:
            return adam
        workers = self.cluster.num_tasks('worker')
        self.averaging = tf.train.SyncReplicasOptimizer(adam, workers, workers)
        return self.averaging

    def tell_servers(self):
        """The operations that tell the parameter servers that all is done."""
        return [done_queue(ps).enqueue(True) for ps in range(self.cluster.num_tasks('ps'))]

    def skip_used_batches(self, step, train):
        """With --seed, goes on in the order of the minibatches after those of earlier steps."""
        if self.seed is not None:
            workers = 1 if self.flags.sync_replicas else self.cluster.num_tasks('worker')
            for _ in range(step // workers):
                train.next_batch(self.flags.batch_size)

    @contextlib.contextmanager
    def saving_on_error(self, session):
        """In this context, a standard output that nobody takes any more costs no steps."""
        try:
            yield
        except OSError:
            if self.lock:
                session.run_step_fn(self.save)
            raise

    def save_is_due(self, step, stopping):
        """Whether the chief saves now, after `step` steps."""
        every, saved = self.flags.save_checkpoints_steps, self.checkpoints.last_step
        return self.lock and (stopping or step >= self.flags.max_steps
                              or step // every > saved // every)

    def save(self, step_context):
        """Saves a checkpoint, and returns the number of steps in it."""
        # Done again after a server was lost, step_context would still have the session of before.
        self.checkpoints.save(self.session)
        return self.checkpoints.last_step

    # What TensorFlow calls.

    def begin(self):
        """Called when the graph is complete. Checkpoints have the names of mnist_deep.py."""
        self.checkpoints = model_dir.Checkpoints(self.flags.model_dir, self.lock, {
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
        path = self.checkpoints.find() if self.lock else None
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
            print(f'going on from step {self.checkpoints.last_step} of {self.flags.max_steps}',
                  file=sys.stderr)
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
LAST_STEP = 10  # seconds that the chief's step has after a signal, before it is saved as it is


def watch(workers):
    """Runs this process's workers in threads, until the first one is done. The main thread tells
    meanwhile what that one waits for, and handles signals: a step may wait for ever, for a machine
    that is gone. Returns the exit code.
    """
    worker = workers[0]
    pool = concurrent.futures.ThreadPoolExecutor(len(workers))
    try:
        with model_dir.signals_held_back() as signals:
            trainings = [pool.submit(work, each) for each in workers]
            try:
                is_alone = is_left_alone(worker, trainings, signals)
                if signals:
                    raise model_dir.Stopped(signals[0])
            except BaseException as error:  # whatever it is, steps are not to be lost by it
                stop_and_save(workers, trainings)
                if worker.lock and worker.checkpoints and isinstance(error, KeyboardInterrupt):
                    error.args = (worker.checkpoints.what_is_kept(),)
                raise
        return end_alone(worker) if is_alone else 0
    finally:
        if worker.lock:
            worker.lock.close()


def is_left_alone(worker, trainings, signals):
    """Waits until the first training is done, or a signal has come; tells what that one waits for.

    Returns:
        True if it waits in vain: the whole training is over, and all others are gone.

    Raises:
        OSError: all others are gone, and nothing says that it is over; or what a training raises.
    """
    alone = 0  # how many times in a row
    while not ended_or_signalled(PATIENCE, trainings, signals):
        if not worker.heard or time.monotonic() < worker.heard + PATIENCE:
            continue
        needs = worker.needs()
        gone = [name for name, address in needs.items() if not answers(address)]
        print('waiting for', ' and '.join(gone) or f'an answer of {", or ".join(needs)}',
              file=sys.stderr, flush=True)
        alone = alone + 1 if len(gone) == len(needs) else 0
        if alone and is_trained(worker.flags):
            return True
        if alone == LAST_LINE and not worker.is_chief:
            raise OSError('the parameter servers and the chief are gone: the training has '
                          'ended, or failed')
    return False


def ended_or_signalled(seconds, trainings, signals):
    """Whether the first training ends, or a signal comes, within so many seconds.

    They are waited for in parts. A signal may reach any thread, and the main one, which handles it,
    then learns of it only when it goes on by itself. What a training has raised is raised again.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended = concurrent.futures.wait(trainings, 0.1).done
        for training in ended:
            training.result()  # raises its error
        if trainings[0] in ended or signals:
            return True
    return False


def stop_and_save(workers, trainings):
    """Ends the trainings, and sees to it that the chief saves, also if its step waits for ever."""
    for worker in workers:
        worker.stopping.set()
    chief, session = workers[0], workers[0].session
    if not chief.lock or not session:  # there is none while a parameter server is gone
        return
    if concurrent.futures.wait(trainings[:1], LAST_STEP).done:
        trainings[0].result()  # it has saved, or tells why not
        return
    with contextlib.suppress(tf.errors.AbortedError, tf.errors.UnavailableError,
                             RuntimeError):  # or the session was closed meanwhile
        chief.checkpoints.save(session)


def is_trained(flags):
    """Whether the folder has the checkpoint of the last step."""
    newest = model_dir.checkpoints(flags.model_dir)[:1] if flags.model_dir else []
    return bool(newest) and model_dir.steps_of(newest[0]) >= flags.max_steps


def end_alone(worker):
    """Ends a task that was started again, or woke, when the training was over and all others gone.

    The chief tests the network, as `mnist_deep.py` does. Returns the exit code.
    """
    if worker.is_chief:
        worker.lock.close()  # for the test takes it
        with tf.Graph().as_default():
            mnist_deep.train(worker.flags)
    else:
        path = model_dir.checkpoints(worker.flags.model_dir)[0]
        print(f'trained for {model_dir.steps_of(path)} steps already', file=sys.stderr)
    return 0


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
        jobs = {'ps': jobs['ps'], 'worker': chiefs + jobs.get('worker', [])}
        for name, addresses in jobs.items():
            if not addresses:
                raise ValueError(f'the job "{name}" has no address')
            if isinstance(addresses, dict):  # TensorFlow takes numbered addresses, too, with gaps
                raise ValueError(f'the addresses of the job "{name}" are not a list')
            for address in addresses:
                if not re.fullmatch(r'.+:[0-9]+', address):
                    raise ValueError(f'{address} is not "host:port"')
        cluster = tf.train.ClusterSpec(jobs)
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
