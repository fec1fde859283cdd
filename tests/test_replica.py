"""Part four of the tutorial: many workers, and what happens when one of them dies."""

import json
import os
import re
import shutil
import signal
import socket
import time

import forked
import numpy as np
import psutil
import pytest
from conftest import ENVIRONMENT, ROOT, own_line, own_lines, python

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

# A task that tells what it waits for three times a second.
IMPATIENT = 'assert replica.PATIENCE == 30\nmnist_replica.PATIENCE = 0.3'
# A chief that is killed before it evaluates.
SHORT_LIVED = """
def in_batches(_):
    os.kill(os.getpid(), signal.SIGKILL)
mnist_deep.in_batches = in_batches
"""
# A chief that is killed when it has taken the gradients, and not yet applied their mean.
KILLED_BETWEEN = """
def average(self, session):
    time.sleep(2)  # by then, both workers wait for the end of the step
    takes = [operation for operation in session.graph.get_operations()
             if operation.type.endswith('AccumulatorTakeGradient')]
    session.run(takes, {take.inputs[1]: 1 for take in takes})  # however many are there
    os.kill(os.getpid(), signal.SIGKILL)
replica.Worker.average = average
"""
# A chief whose connection breaks for a moment.
CUT_OFF = """
heard, runs = replica.Worker.after_run, []
def after_run(self, *arguments):
    runs.append(arguments)
    if len(runs) == 20:
        raise replica.tf.errors.UnavailableError(None, None, 'Socket closed')
    heard(self, *arguments)
replica.Worker.after_run = after_run
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
        process = forked.start(
            '-c', 'import os, signal, time, mnist_deep\nfrom extras import replica\n'
            f'{code}\nos._exit(mnist_deep.run(replica.main) or 0)',
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
            '--save_checkpoints_steps=10', *flags], tmp_path / 'model', host))
        return made[-1]
    yield make
    for one in made:
        one.end()


def until(condition, process):
    """Waits for something that a process does."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def saved(folder):
    """The steps of a folder's checkpoints, the oldest first."""
    return sorted(map(model_dir.steps_of, model_dir.checkpoints(str(folder))))


def newest(folder):
    """The step of a folder's newest checkpoint, -1 if it has none."""
    return max(saved(folder), default=-1)


def checkpoint_after(folder, step):
    """Whether a folder has a checkpoint of a later step, to be asked again and again."""
    return lambda: newest(folder) > step


def next_line(process):
    """The next line on a process's standard error that does not tell what it waits for."""
    while (line := own_line(process)).startswith('waiting for'):
        pass
    return line


def joined(process):
    """The step at which a worker has joined."""
    line = next_line(process)
    step = re.fullmatch(r'worker \d joins at step (\d+)\n', line)
    assert step, (line, process.poll())
    return int(step[1])


def last_step(folder):
    return int(tf.train.latest_checkpoint(folder).rsplit('-', 1)[1])


def weights(folder):
    reader = tf.train.load_checkpoint(str(folder))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


# On this machine

TWELVE = ['--seed=3', '--max_steps=12', '--batch_size=50']


@pytest.fixture(scope='module')
def alone(tmp_path_factory, few_digits):
    """A folder after 12 steps of mnist_deep.py, and what it printed."""
    folder = tmp_path_factory.mktemp('alone')
    process = forked.start('mnist_deep.py', *TWELVE, '--data_dir', few_digits,
                           '--model_dir', folder)
    return folder, process.communicate(timeout=60)[0]


@pytest.mark.parametrize('mode', [[], ['--sync_replicas']])
def test_one_worker_learns_what_mnist_deep_learns(mode, alone, cluster, tmp_path):
    folder, printed = alone
    tasks = cluster(1, 12, *TWELVE, *mode)
    tasks.start('ps')
    assert tasks.start('worker').communicate(timeout=120)[0] == printed != ''
    expected, found = weights(folder), weights(tmp_path / 'model')
    assert expected.keys() == found.keys()
    for name in expected:
        assert np.allclose(expected[name], found[name], atol=1e-5), name


# Notes the labels of each minibatch that a worker draws, in a file named by its number.
NOTES = """
import json, os, input_data
draw = input_data.DataSet.next_batch
def next_batch(self, size, shuffle=True):
    batch = draw(self, size, shuffle=shuffle)
    task = json.loads(os.environ['TF_CONFIG'])['task']
    if shuffle and task['type'] == 'worker':
        with open(f'{os.environ["NOTES"]}/batches-{task["index"]}', 'a') as notes:
            notes.write(''.join(map(str, batch[1].argmax(1))) + '\\n')
    return batch
if 'TF_CONFIG' in os.environ:
    input_data.DataSet.next_batch = next_batch
"""


def batches_in_order(folder, worker, few_digits, seed):
    """How many minibatches of 20 a worker has noted, all in the order of its own."""
    train = input_data.read_data_sets(few_digits, seed=(seed + worker) % 2**32).train
    batches = (folder / f'batches-{worker}').read_text().split()
    assert batches == [''.join(map(str, train.next_batch(20)[1])) for _ in batches]
    return len(batches)


def test_a_local_cluster_goes_on_shows_the_tutorials_lines_and_leaves_nothing(
        alone, tmp_path, few_digits, capsys):
    (tmp_path / 'sitecustomize.py').write_text(NOTES)
    folder = shutil.copytree(alone[0], tmp_path / 'model')
    flags = ['--data_dir', str(few_digits), '--model_dir', str(folder)]
    result = python('-m', 'extras.replica', '--workers=2', '--batch_size=20', '--max_steps=120',
                    '--seed', 2**32 - 1, *flags,
                    env={**ENVIRONMENT, 'PYTHONPATH': f'{tmp_path}:{ROOT}', 'NOTES': str(tmp_path)})
    assert (result.returncode, result.stderr) == (0, 'going on from step 12 of 120\n')
    *lines, last = result.stdout.splitlines()
    shown = [re.fullmatch(r'step (\d+), training accuracy [01](\.\d+)?', line) for line in lines]
    assert [int(match[1]) // 100 for match in shown] == [0, 1]
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', last)[1]) > 0.5
    assert last_step(folder) in (120, 121)
    assert not [process for process in psutil.process_iter(['cmdline'])
                if str(folder) in str(process.info['cmdline'])]

    # Each worker has gone on in an order of its own, after its share of the steps.
    for worker in range(2):
        assert batches_in_order(tmp_path, worker, few_digits, 2**32 - 1) > 12 // 2

    # And each other script goes on with what a cluster has kept.
    mnist_deep.main(['--max_steps=123', *flags])
    assert re.fullmatch(r'going on from step \d+ of 123\n', capsys.readouterr().err)
    assert last_step(folder) == 123
    predict.main([str(ROOT / 'docs' / 'digit.png'), f'--model_dir={folder}'])
    assert re.search(r'digit.png: \d \(', capsys.readouterr().out)


def test_synchronous_workers_go_on_step_by_step(alone, cluster, tmp_path, few_digits):
    folder = shutil.copytree(alone[0], tmp_path / 'model')
    tasks = cluster(2, 60, '--seed=3', '--batch_size=20', '--sync_replicas', '--bfloat16')
    code = (f'os.environ.update(ONEDNN_MAX_CPU_ISA="AVX512_CORE", NOTES={str(tmp_path)!r})\n'
            + NOTES)
    server, chief, worker = (tasks.start('ps'), tasks.start('worker', 0, code=code),
                             tasks.start('worker', 1, code=code))
    output, errors = chief.communicate(timeout=120)
    assert chief.returncode == worker.wait(60) == server.wait(60) == 0
    slow = '--bfloat16: this CPU could only emulate it, slowly; training in float32\n'
    assert own_lines(errors) == slow + 'going on from step 12 of 60\n'
    assert own_lines(worker.stderr.read()) == slow + 'worker 1 joins at step 12\n'
    assert re.fullmatch(r'step 12, training accuracy [01](\.\d+)?\ntest accuracy 0\.\d+\n', output)
    assert float(output.split()[-1]) > 0.5
    assert last_step(folder) == 60
    for worker in range(2):  # all that the first twelve steps drew, and all since then
        assert batches_in_order(tmp_path, worker, few_digits, 3) == 60


def local_cluster(workers, few_digits, folder, *flags):
    """A running cluster, and all its processes, while it trains."""
    process = forked.start('-m', 'extras.replica', f'--workers={workers}', '--max_steps=100000',
                           '--batch_size=5', '--data_dir', few_digits, '--model_dir', folder,
                           *flags)
    assert process.stdout.readline().startswith('step ')
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 1 + workers
    return process, children


@pytest.mark.parametrize('number, workers, flags', [(signal.SIGINT, 2, []),
                                                    (signal.SIGTERM, 1, ['--sync_replicas'])])
def test_ctrl_c_and_sigterm_keep_the_network_and_leave_no_process(number, workers, flags,
                                                                  few_digits, tmp_path):
    process, children = local_cluster(workers, few_digits, tmp_path, *flags)
    process.send_signal(number)
    errors = own_lines(process.communicate(timeout=60)[1])
    assert process.returncode == 128 + number
    step = re.fullmatch(fr'stopped at step (\d+), kept in {tmp_path}\n', errors)
    assert step and last_step(tmp_path) == int(step[1]) > 0, errors
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_when_one_process_fails_all_end(few_digits, tmp_path):
    process, children = local_cluster(1, few_digits, tmp_path)
    task = {'type': 'worker', 'index': 0}
    next(child for child in children
         if json.loads(child.environ()['TF_CONFIG'])['task'] == task).kill()
    errors = own_lines(process.communicate(timeout=60)[1])
    assert (process.returncode, errors) == (1, 'worker 0 has ended with code -9, so all end\n')
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_no_process_outlives_the_one_that_started_it(few_digits, tmp_path):
    process, children = local_cluster(1, few_digits, tmp_path)
    process.kill()
    process.communicate()
    assert not psutil.wait_procs(children, timeout=60)[1]


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
        until(checkpoint_after(model, newest(model) + 20), chief)
    worker = tasks.start('worker', 1)
    joined(worker)
    until(checkpoint_after(model, max(newest(model), 0) + 10), chief)

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
        assert own_line(process).startswith('a parameter server was lost; training goes on')
    assert own_line(chief).startswith(f'{damaged} is damaged (')
    assert own_line(chief) == f'going on from step {before} of 100000\n'
    until(checkpoint_after(model, newest(model)), chief)
    with pytest.raises(OSError, match='another training uses it'):
        mnist_deep.main([f'--model_dir={model}', f'--data_dir={few_digits}'])

    chief.kill()
    chief.communicate()
    last = newest(model) + 20
    if mode:
        assert tasks.start('worker', 0, code=KILLED_BETWEEN).wait(120) == -signal.SIGKILL
    chief = tasks.start('worker', 0, '--max_steps', last, code=SHORT_LIVED)
    assert chief.wait(120) == -signal.SIGKILL
    assert newest(model) >= last  # it saves before it evaluates; the other may have been further

    if mode:
        chief = tasks.start('worker', 0, code=CUT_OFF)
        assert own_line(chief).startswith('going on from step')
        assert own_line(chief).startswith('a parameter server was lost; training goes on')
        until(checkpoint_after(model, newest(model) + 20), chief)
        for process in (worker, server, chief):  # as Kubernetes does it
            process.terminate()
        errors = own_lines(chief.communicate(timeout=60)[1])
        assert errors.splitlines()[1:] == [f'stopped at step {newest(model)}, kept in {model}']
        assert chief.returncode == worker.wait(60) == server.wait(60) == 128 + signal.SIGTERM
        assert own_lines(worker.stderr.read()) == 'stopped\n'
    else:
        for _ in range(2):  # the second time, as if it had been killed as it ended
            chief = tasks.start('worker', 0, '--max_steps', last)
            output, errors = chief.communicate(timeout=120)
            assert chief.returncode == 0 and 'test accuracy' in output, errors
            assert re.fullmatch(fr'going on from step \d+ of {last}\n', own_lines(errors))
        assert server.poll() is None  # the other worker is there, and trains further
        worker.kill()
        assert server.wait(60) == 0


def test_one_that_is_suspended_is_waited_for_and_goes_on_or_ends(cluster, tmp_path):
    tasks, model = cluster(4, 200), tmp_path / 'model'
    address, = tasks.addresses['ps']
    server = tasks.start('ps', code=IMPATIENT)
    others = [tasks.start('worker', 1), tasks.start('worker', 2, code=IMPATIENT),
              tasks.start('worker', 3, '--max_steps=100000', code=IMPATIENT)]
    chief = tasks.start('worker', 0, code=IMPATIENT)
    for process in others:
        joined(process)

    server.send_signal(signal.SIGSTOP)
    answer = f'waiting for an answer of the parameter server at {address}\n'
    for _ in range(2):
        until(lambda: own_line(chief) == answer, chief)
    server.send_signal(signal.SIGCONT)
    until(checkpoint_after(model, newest(model)), chief)

    for process in others:
        process.send_signal(signal.SIGSTOP)
    output, errors = chief.communicate(timeout=120)
    assert chief.returncode == 0 and 'test accuracy' in output, errors
    there = ' and '.join(tasks.addresses['worker'][1:])
    assert own_line(server) == f'waiting for the end of the worker at {there}\n'
    others[0].send_signal(signal.SIGCONT)  # it still finds the ps
    assert others[0].wait(60) == 0
    server.kill()
    server.communicate()
    for process in others[1:]:
        process.send_signal(signal.SIGCONT)
    for process, code in zip(others[1:], (0, 2)):  # by the checkpoints, this was the end, or not
        assert process.wait(120) == code
    assert 'and the chief are gone: the training has ended, or failed' in process.stderr.read()


# What is wrong is said in one line

GOOD = {'cluster': {'ps': ['127.0.0.1:1'], 'worker': ['127.0.0.1:2', '127.0.0.1:3']},
        'task': {'type': 'worker', 'index': 0}}


def changed(**parts):
    return json.dumps({**GOOD, **parts})


@pytest.mark.parametrize('config, message', [
    ('', 'TF_CONFIG is not set.* or give --workers 2'),
    ('{"cluster"', 'expected JSON as in --help'),
    ('[]', 'expected JSON as in --help'),
    (json.dumps({'cluster': GOOD['cluster']}), r"and a task \(KeyError: 'task'\)"),
    (json.dumps({'task': GOOD['task']}), r"KeyError: 'cluster'"),
    (changed(task={'type': 'worker'}), "KeyError: 'index'"),
    *[(changed(task={'type': 'worker', 'index': index}), 'has the task .*, expected one of')
      for index in ('one', None, 0.0, True, [], '-1', '1.0', '')],
    (changed(task={'type': 'worker', 'index': 2}), "has the task .*2}, expected one of .*counted"),
    (changed(task={'type': 'worker', 'index': -1}), "has the task .*-1}, expected one of"),
    (changed(task={'type': 'ps', 'index': 1}), 'has the task'),
    (changed(task={'type': 'evaluator', 'index': 0}), 'has no evaluator: its chief evaluates'),
    (changed(cluster={**GOOD['cluster'], 'evaluator': ['127.0.0.1:4']},
             task={'type': 'evaluator', 'index': 0}), 'has no evaluator: its chief evaluates'),
    (changed(task={'type': 'chief', 'index': 0}), 'has the task'),
    (changed(cluster={'ps': ['127.0.0.1:1']}), r"has the jobs \['ps'\], expected \"ps\" and"),
    (changed(cluster={'worker': ['127.0.0.1:1']}), r"has the jobs \['worker'\]"),
    (changed(cluster={'ps': [], 'worker': ['127.0.0.1:1']}), 'has the jobs'),
    (changed(cluster={'ps': ['here'], 'worker': ['127.0.0.1:1']}), '"host:port" addresses'),
    (changed(cluster={'ps': ['here:http'], 'worker': ['127.0.0.1:1']}), '"host:port" addresses')])
def test_a_wrong_tf_config(config, message, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', config)
    with pytest.raises(ValueError) as refused:
        replica.main(['--model_dir=model'])
    line, = str(refused.value).splitlines()
    assert line.startswith('TF_CONFIG ') and re.search(message, line)


def test_a_chief_is_worker_0(monkeypatch):
    jobs = {'ps': ['a:1'], 'chief': ['b:2'], 'worker': ['c:3', 'd:4']}
    for task, expected in (({'type': 'chief', 'index': 0}, ('worker', 0)),
                           ({'type': 'chief', 'index': '0'}, ('worker', 0)),
                           ({'type': 'worker', 'index': 1}, ('worker', 2)),
                           ({'type': 'ps', 'index': 0}, ('ps', 0))):
        monkeypatch.setenv('TF_CONFIG', json.dumps({'cluster': jobs, 'task': task}))
        cluster, *found = replica.read_tf_config()
        assert tuple(found) == expected
        assert cluster.as_dict() == {'ps': ['a:1'], 'worker': ['b:2', 'c:3', 'd:4']}


@pytest.mark.parametrize('flags, message', [
    (['--workers=0'], 'argument --workers: 0 is not a number above 0'),
    (['--workers=2', '--max_steps=0'], 'argument --max_steps: 0 is not a number above 0'),
    (['--workers=2', '--data_dir=/dev/null/x'], "'/dev/null/x'"),
    (['--workers=2', '--seed=-1'], 'argument --seed: -1 is not from 0 to 4294967295'),
    (['--seed=4294967296'], 'argument --seed: 4294967296 is not from 0 to 4294967295'),
    ([], '--model_dir: a cluster needs a folder')])
def test_wrong_flags(flags, message, monkeypatch):
    monkeypatch.setenv('TF_CONFIG', json.dumps(GOOD))
    with pytest.raises((OSError, ValueError)) as refused:
        replica.main(flags)
    line, = str(refused.value).splitlines()
    assert message in line


@pytest.mark.parametrize('job', ['ps', 'worker'])
def test_an_address_that_is_taken(job, cluster):
    tasks = cluster(1, 10)
    with listen(tasks.addresses[job][0]):
        process = tasks.start(job)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (2, '')
    line, = own_lines(errors).splitlines()
    assert tasks.addresses[job][0] in line and 'is it taken' in line


def test_a_folder_of_something_else_is_refused_and_left(cluster, tmp_path):
    (tmp_path / 'model').mkdir()
    (tmp_path / 'model' / 'letter.txt').write_text('Dear reader')
    chief = cluster(1, 10).start('worker')
    errors = own_lines(chief.communicate(timeout=60)[1])
    assert chief.returncode == 2
    line, = errors.splitlines()
    assert 'it holds letter.txt, and no checkpoint of this network' in line
    assert os.listdir(tmp_path / 'model') == ['letter.txt']


def test_those_that_are_missing_or_do_not_answer_are_named_again_and_again(cluster):
    tasks = cluster(2, 30, host=HOST6)
    the_ps = re.escape(f'the parameter server at {tasks.addresses["ps"][0]}')
    the_chief = re.escape(f'the chief, worker 0 at {tasks.addresses["worker"][0]}')
    refused = r' \(.*refused\)'

    def says(process, names):
        for _ in range(2):
            until(lambda: re.fullmatch(f'waiting for {names}\n', own_line(process)), process)

    with listen(tasks.addresses['ps'][0]):  # something else, or a machine that hangs
        chief = tasks.start('worker', 0, code=IMPATIENT)
        worker = tasks.start('worker', 1, code=IMPATIENT)
        says(chief, f'an answer of {the_ps}')
        says(worker, f'an answer of {the_ps}, or {the_chief}')
        chief.send_signal(signal.SIGINT)  # Ctrl-C ends the waiting at once
        assert chief.wait(60) == 130
        assert own_lines(chief.stderr.read()).endswith('stopped\n')
    says(worker, f'{the_ps}{refused} and {the_chief}{refused}')
    server = tasks.start('ps')
    says(worker, f'{the_chief}{refused}')
    chief = tasks.start('worker', 0)
    assert 'test accuracy' in chief.communicate(timeout=120)[0]
    assert worker.wait(60) == server.wait(60) == 0


def test_help_tells_the_danger_and_every_flag(capsys):
    with pytest.raises(SystemExit, match='^0$'):
        replica.main(['--help'])
    output = capsys.readouterr().out
    for text in ('no passwords', 'every network interface', 'TF_CONFIG', '--workers',
                 '--sync_replicas', '--model_dir'):
        assert text in output
