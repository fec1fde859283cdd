"""Many workers, and what happens when one of them dies."""

import json
import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, fork, next_line, own_lines, until, watch_batches

import input_data
import mnist_deep
import model_dir
from extras import predict, replica

tf = mnist_deep.tf

HOST = '127.0.0.1'
try:
    socket.create_server(('::1', 0), family=socket.AF_INET6).close()
    HOST6 = '[::1]'
except OSError:  # a machine without IPv6
    HOST6 = HOST

# A worker that rests after each step, so that tasks which start meanwhile get the processor.
RESTING = """
ran = replica.Worker.after_run
def after_run(*arguments):
    time.sleep(0.05)
    ran(*arguments)
replica.Worker.after_run = after_run
"""
# A task that tells what it waits for ten times a second.
IMPATIENT = 'assert (replica.PATIENCE, replica.LAST_LINE) == (30, 10)\nreplica.PATIENCE = 0.1'
STUBBORN = f'{IMPATIENT}\nreplica.LAST_LINE = 10**9'
# A worker that tells of each step, and does not wait long for a last step that never ends.
HASTY = """
assert replica.LAST_STEP == 10
replica.LAST_STEP = 1
def after_run(*arguments):
    ran(*arguments)
    print('one more', flush=True)
replica.Worker.after_run = after_run
"""
# A chief that is killed before it evaluates.
SHORT_LIVED = """
def in_batches(_):
    os.kill(os.getpid(), signal.SIGKILL)
mnist_deep.in_batches = in_batches
"""
# A chief that is killed when it has taken the gradients, and not yet applied their mean.
KILLED_BETWEEN = """
def average(self, session):
    time.sleep(1)  # by then, both workers wait for the end of the step
    takes = [operation for operation in session.graph.get_operations()
             if operation.type.endswith('AccumulatorTakeGradient')]
    session.run(takes, {take.inputs[1]: 1 for take in takes})  # however many are there
    os.kill(os.getpid(), signal.SIGKILL)
replica.Worker.average = average
"""
# A chief whose connection breaks for a moment, first while it saves, then in a step.
CUT_OFF = """
def cut_off(function, moment):
    calls = []
    def called(*arguments):
        calls.append(arguments)
        if len(calls) == moment:
            raise replica.tf.errors.UnavailableError(None, None, 'Socket closed')
        return function(*arguments)
    return called
replica.model_dir.Checkpoints.save = cut_off(replica.model_dir.Checkpoints.save, 1)
replica.Worker.after_run = cut_off(replica.Worker.after_run, 15)
"""


class Cluster:
    """Tasks of a cluster as processes, each with its TF_CONFIG, on free ports of loopback."""

    def __init__(self, workers, flags, folder, host=HOST):
        self.flags, self.folder, self.processes = flags, folder, []
        free = [listen(f'{host}:0') for _ in range(1 + workers)]
        addresses = [f'{host}:{bound.getsockname()[1]}' for bound in free]
        for bound in free:
            bound.close()
        self.addresses = {'ps': addresses[:1], 'worker': addresses[1:]}

    def start(self, job, index=0, *flags, code=''):
        """Starts a task; code: what is done in `extras.replica` before it runs."""
        config = json.dumps({'cluster': self.addresses, 'task': {'type': job, 'index': index}})
        if job == 'worker':  # a ps needs no folder
            flags = ['--model_dir', self.folder, *flags]
        process = fork(
            '-c', 'import os, signal, time, mnist_deep\nfrom extras import replica\n'
            f'{RESTING}\n{code}\nreplica.run()',
            *self.flags, *flags, env={**ENVIRONMENT, 'TF_CONFIG': config})
        self.processes.append(process)
        return process

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


def listen(address):
    """A socket that listens at host:port."""
    host, port = address.rsplit(':', 1)
    family = socket.AF_INET6 if host == '[::1]' else socket.AF_INET
    return socket.create_server((host.strip('[]'), int(port)), family=family)


@pytest.fixture
def cluster(tmp_path, few_digits):
    """Makes clusters that keep their network in the test's folder."""
    made = []

    def make(workers, steps, *flags, host=HOST):
        made.append(Cluster(workers, [
            '--max_steps', steps, '--seed=1', '--batch_size=5', '--data_dir', few_digits,
            '--save_checkpoints_steps=5', *flags], tmp_path / 'model', host))
        return made[-1]
    yield make
    for one in made:
        one.end()


@pytest.fixture
def train(few_digits, tmp_path, capsys):
    """Trains with --workers in this process, in the folder "model"; what it printed, and errors."""
    def train(*flags):
        assert replica.main(['--batch_size=20', f'--data_dir={few_digits}',
                             f'--model_dir={tmp_path / "model"}', *flags]) == 0
        return capsys.readouterr()
    return train


def saved(folder):
    """The steps of a folder's checkpoints, the oldest first."""
    return sorted(map(model_dir.steps_of, model_dir.checkpoints(str(folder))))


def newest(folder):
    """The step of a folder's newest checkpoint, -1 if it has none."""
    return max(saved(folder), default=-1)


def checkpoint_after(folder, step):
    """Whether a folder has a checkpoint of a later step, to be asked again and again."""
    return lambda: newest(folder) > step


def told(process):
    """The next line on a process's standard error that does not tell what it waits for."""
    while (line := next_line(process)).startswith('waiting for'):
        pass
    return line


def joined(process):
    """The step at which a worker has joined."""
    line = told(process)
    step = re.fullmatch(r'worker \d joins at step (\d+)\n', line)
    assert step, (line, process.poll())
    return int(step[1])


def weights(folder):
    reader = tf.train.load_checkpoint(str(folder))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# On this machine

@pytest.fixture(scope='module')
def twelve_steps(tmp_path_factory, few_digits):
    """A folder after 12 steps of mnist_deep.py."""
    folder = tmp_path_factory.mktemp('twelve_steps')
    mnist_deep.main(['--seed=3', '--max_steps=12', '--batch_size=20', f'--data_dir={few_digits}',
                     f'--model_dir={folder}'])
    return folder


@pytest.mark.parametrize('mode', [[], ['--sync_replicas']])
def test_one_worker_learns_what_mnist_deep_learns(mode, twelve_steps, train, tmp_path):
    train('--workers=1', '--seed=3', '--max_steps=12', *mode)
    expected, found = weights(twelve_steps), weights(tmp_path / 'model')
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.allclose(expected[name], found[name], atol=1e-5), name


@pytest.mark.parametrize('flags, end, passed_over', [
    ([], 120, 6), (['--sync_replicas', '--bfloat16'], 40, 12)])
def test_two_workers_go_on_each_in_its_own_order(flags, end, passed_over, twelve_steps, train,
                                                 tmp_path, few_digits, monkeypatch, capsys):
    shutil.copytree(twelve_steps, tmp_path / 'model')
    monkeypatch.setattr(mnist_deep, 'computes_in_bfloat16', lambda: False)
    drawn = watch_batches(monkeypatch)
    output, errors = train('--workers=2', f'--max_steps={end}', f'--seed={2**32 - 1}',
                           '--batch_size=5', '--learning_rate=1e-3', *flags)
    assert errors == ('--bfloat16: this CPU could only emulate it, slowly; training in float32\n'
                      if '--bfloat16' in flags else '') + f'going on from step 12 of {end}\n'
    *lines, last = output.splitlines()
    shown = [re.fullmatch(r'step (\d+), training accuracy [01](\.\d+)?', line) for line in lines]
    assert [int(match[1]) // 100 for match in shown] == list(range(end // 100 + 1))
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', last)[1]) > (0.5 if end > 100 else 0.4)
    assert newest(tmp_path / 'model') in ([end] if flags else [end, end + 1])

    # Each one has gone on in an order of its own, after its share of the steps.
    monkeypatch.undo()
    orders = [input_data.read_data_sets(few_digits, one_hot=True, seed=seed).train
              for seed in (2**32 - 1, 0)]
    firsts = [order.next_batch(5)[1].tolist() for order in orders]
    assert len(drawn) == 2
    for first, *others in drawn.values():
        order = orders[firsts.index(first)]
        assert others == [order.next_batch(5)[1].tolist() for _ in others]
    steps = (end - 12) * (2 if '--sync_replicas' in flags else 1)  # of both workers
    assert sum(map(len, drawn.values())) >= steps + 2 * passed_over

    # And each other script goes on with what a cluster has kept.
    mnist_deep.main([f'--max_steps={end + 2}', f'--data_dir={few_digits}',
                     f'--model_dir={tmp_path / "model"}'])
    assert re.fullmatch(fr'going on from step \d+ of {end + 2}\n', capsys.readouterr().err)
    predict.main([str(ROOT / 'docs' / 'digit.png'), f'--model_dir={tmp_path / "model"}'])
    assert re.search(r'digit.png: \d \(', capsys.readouterr().out)


@pytest.mark.parametrize('number, again, flags', [
    (signal.SIGINT, signal.SIGTERM, ['--workers=2']),
    (signal.SIGTERM, signal.SIGTERM, ['--workers=1', '--sync_replicas'])])
def test_a_signal_to_all_processes_keeps_the_network(number, again, flags, few_digits, tmp_path):
    process = fork('-m', 'extras.replica', '--max_steps=100000', *flags, '--batch_size=5',
                   '--data_dir', few_digits, '--model_dir', tmp_path, start_new_session=True)
    assert process.stdout.readline().startswith('step ')
    os.killpg(process.pid, number)
    while process.poll() is None:  # meanwhile, more of them
        process.send_signal(again)
        time.sleep(0.02)
    errors = own_lines(process.communicate(timeout=60)[1])
    assert process.returncode == 128 + number
    step = re.fullmatch(fr'stopped at step (\d+), kept in {tmp_path}\n', errors)
    assert step and newest(tmp_path) == int(step[1]) > 0, errors


def test_weights_that_are_no_numbers_are_not_saved(twelve_steps, train, tmp_path):
    shutil.copytree(twelve_steps, tmp_path / 'model')
    with pytest.raises(ValueError, match='at step 20 the loss is not a number, so nothing is'):
        train('--workers=1', '--max_steps=40', '--learning_rate=1e30',
              '--save_checkpoints_steps=10')
    assert saved(tmp_path / 'model') == [12]


def test_a_full_disk_is_one_line_and_leaves_no_temporary_file(twelve_steps, train, disk):
    shutil.copytree(twelve_steps, disk.folder, dirs_exist_ok=True)
    disk.fill()
    with pytest.raises(OSError, match='the checkpoint of step 15 cannot be saved '
                                      fr'\({disk.reason}\); that of step 12 is kept'):
        train('--workers=1', '--max_steps=15')
    assert not list(disk.folder.glob('*tempstate*')) and saved(disk.folder) == [12]


def test_if_nobody_takes_its_output_the_chief_saves_and_ends(few_digits, tmp_path):
    process = fork('-m', 'extras.replica', '--workers=1', '--max_steps=100000', '--batch_size=5',
                   '--data_dir', few_digits, '--model_dir', tmp_path)
    assert process.stdout.readline().startswith('step ')
    process.stdout.close()  # as by `| head -1`
    assert process.wait(60) == 2
    assert own_lines(process.stderr.read()).endswith('error: [Errno 32] Broken pipe\n')
    assert newest(tmp_path) >= 100
    process.stdout = None


def test_a_web_proxy_is_not_asked(few_digits, monkeypatch):
    for name in ('no_proxy', 'no_grpc_proxy', 'NO_PROXY'):
        monkeypatch.delenv(name, raising=False)
    for name in ('http_proxy', 'https_proxy', 'grpc_proxy'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')  # where nobody listens
    process = fork('-m', 'extras.replica', '--workers=1', '--max_steps=2', '--data_dir', few_digits,
                   env=dict(os.environ))
    assert 'test accuracy' in process.communicate()[0] and process.returncode == 0


def test_users_own_exceptions_from_a_proxy_are_kept(monkeypatch):
    cluster = tf.train.ClusterSpec({'ps': ['a:1'], 'worker': ['[::1]:2']})
    monkeypatch.delenv('no_grpc_proxy', raising=False)
    monkeypatch.setenv('no_proxy', 'example.org')
    replica.reach_without_proxy(cluster)
    assert os.environ['no_grpc_proxy'].split(',') == ['example.org', 'a', '::1']


# Faults

@pytest.mark.parametrize('mode', [[], ['--sync_replicas']])
def test_each_task_may_be_killed_and_started_again(mode, cluster, tmp_path, few_digits):
    tasks = cluster(2, 100000, *mode, host=HOST6 if mode else HOST)
    model = tmp_path / 'model'
    server, chief, worker = tasks.start('ps'), tasks.start('worker', 0), tasks.start('worker', 1)
    joined(worker)

    worker.kill()
    worker.wait(60)  # its address is free then
    if not mode:  # one that is gone for good leaves the others going
        until(checkpoint_after(model, newest(model) + 5), chief)
    worker = tasks.start('worker', 1)
    joined(worker)
    until(checkpoint_after(model, max(newest(model), 0) + 5), chief)

    # With the ps, its steps since the last whole checkpoint are lost.
    chief.send_signal(signal.SIGSTOP)
    server.kill()
    server.communicate()
    *_, before, last = saved(model)
    damaged = model / f'mnist_deep.ckpt-{last}'
    with open(f'{damaged}.data-00000-of-00001', 'r+b') as f:
        f.truncate(1000000)
    chief.send_signal(signal.SIGCONT)
    server = tasks.start('ps')
    for process in (chief, worker):
        assert next_line(process).startswith('a parameter server was lost; training goes on')
    assert next_line(chief).startswith(f'{damaged} is damaged (')
    assert next_line(chief) == f'going on from step {before} of 100000\n'
    until(checkpoint_after(model, newest(model)), chief)
    with pytest.raises(OSError, match='another training uses it'):
        mnist_deep.main([f'--model_dir={model}', f'--data_dir={few_digits}'])

    chief.kill()
    chief.communicate()
    last = newest(model) + 5
    if mode:
        assert tasks.start('worker', 0, code=KILLED_BETWEEN).wait(120) == -signal.SIGKILL
        chief = tasks.start('worker', 0, code=CUT_OFF)
        for _ in range(2):
            assert next_line(chief).startswith('going on from step')
            assert next_line(chief).startswith('a parameter server was lost; training goes on')
        until(checkpoint_after(model, newest(model) + 5), chief)
    else:
        chief = tasks.start('worker', 0, '--max_steps', last, '--save_checkpoints_steps=100000',
                            code=SHORT_LIVED)
        assert chief.wait(120) == -signal.SIGKILL
        assert newest(model) >= last  # it saves before it evaluates; the other may be further
        for _ in range(2):  # the second time, as if it had been killed as it ended
            chief = tasks.start('worker', 0, '--max_steps', last)
            output, errors = chief.communicate(timeout=120)
            assert chief.returncode == 0 and 'test accuracy' in output, errors
            assert re.fullmatch(fr'going on from step \d+ of {last}\n', own_lines(errors))
        assert server.poll() is None  # the other worker is there, and trains further
        worker.kill()
        assert server.wait(60) == 0


@pytest.mark.parametrize('number, mode', [
    (signal.SIGINT, []), (signal.SIGHUP, []), (signal.SIGTERM, ['--sync_replicas'])])
def test_a_signal_that_all_tasks_get_keeps_the_network(number, mode, cluster, tmp_path):
    tasks, model = cluster(2, 100000, '--save_checkpoints_steps=100000', *mode), tmp_path / 'model'
    server, chief, worker = tasks.start('ps'), *(
        tasks.start('worker', index, code=HASTY) for index in range(2))
    joined(worker)
    assert [chief.stdout.readline() for _ in range(5)].count('one more\n') == 4  # after "step 0"
    worker.send_signal(number)
    assert worker.wait(60) == 128 + number  # with --sync_replicas, a step now waits for ever
    assert own_lines(worker.stderr.read()).endswith('stopped\n')
    for process in (server, chief):
        process.send_signal(number)
    errors = own_lines(chief.communicate(timeout=60)[1])
    assert chief.returncode == server.wait(60) == 128 + number
    assert errors == f'stopped at step {newest(model)}, kept in {model}\n'
    assert newest(model) > 0


def test_tasks_that_wait_say_for_whom_and_end_when_the_training_is_over(cluster, tmp_path):
    tasks, model = cluster(3, 50, host=HOST6), tmp_path / 'model'
    ps, (chief_at, *_) = *tasks.addresses['ps'], tasks.addresses['worker']

    def says(process, line):
        for _ in range(2):
            until(lambda: next_line(process) == f'waiting for {line}\n', process)

    with listen(ps):  # something else, or a machine that hangs
        chief = tasks.start('worker', 0, code=IMPATIENT)
        says(chief, f'an answer of the parameter server at {ps}')
        chief.send_signal(signal.SIGINT)  # Ctrl-C ends the waiting at once
        assert chief.wait(60) == 130
        assert own_lines(chief.stderr.read()).endswith('stopped\n')
    worker = tasks.start('worker', 1, code=STUBBORN)
    says(worker, f'the parameter server at {ps} and the chief, worker 0 at {chief_at}')
    server = tasks.start('ps', code=IMPATIENT)
    says(worker, f'the chief, worker 0 at {chief_at}')
    chief = tasks.start('worker', 0, code=IMPATIENT)
    joined(worker)
    for process in (chief, worker):
        process.send_signal(signal.SIGSTOP)
    late = tasks.start('worker', 2, '--max_steps=100000', code=IMPATIENT)
    joined(late)
    for process in (late, server):
        process.send_signal(signal.SIGSTOP)
    chief.send_signal(signal.SIGCONT)
    says(chief, f'an answer of the parameter server at {ps}')
    server.send_signal(signal.SIGCONT)

    # Those whose machines sleep while all others end: by the checkpoints, it was the end, or not.
    output, errors = chief.communicate(timeout=120)
    assert chief.returncode == server.wait(60) == 0 and 'test accuracy' in output, errors
    for process in (worker, late):
        process.send_signal(signal.SIGCONT)
    assert worker.wait(120) == 0 and late.wait(120) == 2
    already = f'trained for {newest(model)} steps already\n'
    assert worker.stderr.read().endswith(already)
    assert 'and the chief are gone: the training has ended, or failed' in late.stderr.read()

    # And those that are started again when it is over: the chief tests the network once more.
    chief, worker = (tasks.start('worker', index, code=STUBBORN) for index in range(2))
    for process, printed in ((chief, output.splitlines()[-1] + '\n'), (worker, '')):
        found, errors = process.communicate(timeout=120)
        assert (process.returncode, found) == (0, printed), errors
        assert errors.endswith(already)


def test_a_worker_to_whose_lines_nobody_listens_any_more_ends(cluster):
    worker = cluster(2, 10).start('worker', 1, code=IMPATIENT)
    assert next_line(worker).startswith('waiting for')
    worker.stderr.close()
    assert worker.wait(60) == 1
    worker.stderr = None


# What is wrong is said in one line

GOOD = {'cluster': {'ps': ['127.0.0.1:1'], 'worker': ['127.0.0.1:2', '127.0.0.1:3']},
        'task': {'type': 'worker', 'index': 0}}


def changed(**parts):
    return json.dumps({**GOOD, **parts})


@pytest.mark.parametrize('config, message', [
    ('', 'TF_CONFIG is not set.* or give --workers 2'),
    ('{"cluster"', 'JSONDecodeError'), ('[]', "KeyError: 'ps'"),
    (json.dumps({'cluster': GOOD['cluster']}), 'a task in it'),
    (json.dumps({'task': GOOD['task']}), "KeyError: 'ps'"),
    *[(changed(task={'type': 'worker', 'index': index}), 'a task in it')
      for index in ('one', [], 2, -1)],
    (changed(task={'type': 'ps', 'index': 1}), 'a task in it'),
    (changed(task={'type': 'evaluator', 'index': 0}), 'a task in it'),
    (changed(task={'type': 'chief', 'index': 7}), 'a task in it'),
    (changed(cluster={'ps': ['127.0.0.1:1']}), 'the job "worker" has no address'),
    (changed(cluster={**GOOD['cluster'], 'ps': []}), 'the job "ps" has no address'),
    *[(changed(cluster={**GOOD['cluster'], 'ps': [address]}), f'{address} is not "host:port"')
      for address in ('127.0.0.1', 'a:', ':1', 'a:http')],
    (changed(cluster={**GOOD['cluster'], 'ps': {'1': 'a:1'}}), 'of the job "ps" are not a list'),
    (changed(cluster={'worker': ['127.0.0.1:1']}), "KeyError: 'ps'")])
def test_a_wrong_tf_config(config, message, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', config)
    with pytest.raises(ValueError) as refused:
        replica.main(['--model_dir=model'])
    line, = str(refused.value).splitlines()
    assert line.startswith('TF_CONFIG is ') and re.search(message, line)


@pytest.mark.parametrize('chief', ['chief', 'master'])
def test_a_chief_or_master_is_worker_0(chief, monkeypatch):
    jobs = {'ps': ['a:1'], chief: ['b:2'], 'worker': ['c:3', 'd:4']}
    for task, expected in (({'type': chief, 'index': 0}, ('worker', 0)),
                           ({'type': 'worker', 'index': '1'}, ('worker', 2)),
                           ({'type': 'ps', 'index': 0}, ('ps', 0))):
        monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': jobs, 'task': task}))
        cluster, *found = replica.read_tf_config()
        assert tuple(found) == expected
        assert cluster.as_dict() == {'ps': ['a:1'], 'worker': ['b:2', 'c:3', 'd:4']}


@pytest.mark.parametrize('flags, message', [
    (['--workers=0'], 'argument --workers: 0 is not a number above 0'),
    (['--workers=2', '--max_steps=0'], 'argument --max_steps: 0 is not a number above 0'),
    (['--workers=1', '--data_dir=/dev/null/x'], 'the folder /dev/null/x cannot be written to'),
    (['--workers=1', '--model_dir=FOREIGN'], 'it holds letter.txt, and no checkpoint'),
    ([], '--model_dir: a cluster needs a folder')])
def test_wrong_flags(flags, message, tmp_path, monkeypatch):
    (tmp_path / 'FOREIGN').mkdir()
    (tmp_path / 'FOREIGN' / 'letter.txt').write_text('Dear reader')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TF_CONFIG', json.dumps(GOOD))
    with pytest.raises((OSError, ValueError)) as refused:
        replica.main(flags)
    line, = str(refused.value).splitlines()
    assert message in line
    assert os.listdir(tmp_path / 'FOREIGN') == ['letter.txt']


@pytest.mark.parametrize('job', ['ps', 'worker'])
def test_an_address_that_is_taken(job, monkeypatch):
    with listen(f'{HOST}:0') as bound:
        address = f'{HOST}:{bound.getsockname()[1]}'
        config = {'cluster': {**GOOD['cluster'], job: [address]}, 'task': {'type': job, 'index': 0}}
        monkeypatch.setenv('TF_CONFIG', json.dumps(config))
        with pytest.raises(OSError, match=f'^{address}, the address of {job} 0, cannot be used: is '
                                          'its port taken') as refused:
            replica.main(['--model_dir=none'])
    assert '\n' not in str(refused.value)


def test_help_tells_the_danger_and_every_flag(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        replica.main(['--help'])
    output = capsys.readouterr().out
    for text in ('no passwords', 'every network interface', 'TF_CONFIG', '--workers',
                 '--sync_replicas', '--model_dir'):
        assert text in output
