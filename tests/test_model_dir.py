"""What --model_dir adds to mnist_deep.py: stopping and going on, checkpoints, TensorBoard."""

import fcntl
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time

import pytest
from conftest import DATA, fork, next_line, own_lines, start, watch_batches

import input_data
import mnist_deep
import model_dir

tf = mnist_deep.tf


@pytest.fixture(autouse=True)
def graph():
    """A fresh graph for each test."""
    with tf.Graph().as_default() as fresh:
        yield fresh


@pytest.fixture
def train(few_digits, tmp_path, capsys):
    """Trains in the folder "model" in this process, on few digits; what it printed, and errors."""
    def train(*flags):
        mnist_deep.main(['--batch_size=5', f'--data_dir={few_digits}',
                         f'--model_dir={tmp_path / "model"}', *flags])
        return capsys.readouterr()
    return train


@pytest.fixture(scope='module')
def four_steps(tmp_path_factory, few_digits):
    """A folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp('four_steps')
    mnist_deep.main(['--max_steps=4', '--save_checkpoints_steps=2', '--seed=1', '--batch_size=5',
                     f'--data_dir={few_digits}', f'--model_dir={folder}'])
    return folder


def signals_at(steps, monkeypatch):
    """Sends this process a signal as the minibatch of a step is drawn: dict, step -> signal."""
    watch_batches(monkeypatch, lambda step: step in steps and signal.raise_signal(steps[step]))


def files(folder):
    """The contents of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def events(folder):
    """All events of a folder's event files, read by TensorFlow, in order."""
    return [event for path in sorted(folder.glob('events.*'))
            for event in tf.train.summary_iterator(str(path))]


def values(folder):
    """(step, tag, value) of all summaries in a folder."""
    return [(event.step, value.tag, value) for event in events(folder)
            for value in event.summary.value]


# Checkpoints

def test_keeps_the_last_checkpoints_and_the_final_one(trained):
    folder, _ = trained
    assert sorted(name for name in files(folder) if name.endswith('.index')) == [
        'mnist_deep.ckpt-100.index', 'mnist_deep.ckpt-120.index']
    assert tf.train.latest_checkpoint(folder) == str(folder / 'mnist_deep.ckpt-120')


def test_a_checkpoint_restores_by_the_tutorials_recipe(trained):
    folder, output = trained
    x = tf.placeholder(tf.float32, shape=[None, 784])
    y_conv, keep_prob = mnist_deep.deepnn(x)
    test = input_data.read_data_sets(DATA).test
    with tf.Session() as sess:
        tf.train.Saver().restore(sess, tf.train.latest_checkpoint(folder))
        right = sum((y_conv.eval({x: images, keep_prob: 1.0}).argmax(1) == labels).sum()
                    for images, labels in mnist_deep.in_batches(test))
    assert output.endswith('test accuracy %g\n' % (right / 10000))


def test_a_model_folder_changes_nothing_about_the_training(tmp_path, few_digits, capsys):
    printed = []
    for flags in ([], [f'--model_dir={tmp_path}', '--save_checkpoints_steps=2']):
        mnist_deep.main(['--max_steps=20', '--seed=1', '--batch_size=5',
                         f'--data_dir={few_digits}', *flags])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ''


def test_a_finished_model_is_only_evaluated_wherever_it_was_moved(trained, tmp_path, capsys):
    trained_in, output = trained
    folder = shutil.copytree(trained_in, tmp_path / 'elsewhere')
    before = files(folder)
    mnist_deep.main(['--max_steps=120', f'--model_dir={folder}'])
    assert capsys.readouterr() == (output.splitlines()[-1] + '\n',
                                   'trained for 120 steps already\n')
    assert files(folder) == before


def test_a_second_training_is_refused_and_one_after_ctrl_c_does_the_remaining_steps(
        tmp_path, few_digits, capsys):
    folder = tmp_path / 'model'
    flags = ['--data_dir', str(few_digits), '--model_dir', str(folder)]
    process = fork('mnist_deep.py', '--max_steps=100000', *flags)
    assert process.stdout.readline().startswith('step 0,')  # at once, though into a pipe
    with pytest.raises(OSError, match='/model: another training uses it; wait until it ends, or'):
        mnist_deep.main(['--max_steps=1', *flags])
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    step = int(re.fullmatch(fr'stopped at step (\d+), kept in {folder}\n',
                            own_lines(errors))[1])
    assert tf.train.latest_checkpoint(folder) == str(folder / f'mnist_deep.ckpt-{step}')
    mnist_deep.main(['--max_steps', str(step + 5), *flags])
    assert capsys.readouterr().err == f'going on from step {step} of {step + 5}\n'
    assert tf.train.latest_checkpoint(folder) == str(folder / f'mnist_deep.ckpt-{step + 5}')


def test_kill_9_at_any_moment_leaves_a_folder_that_is_free_and_resumes(tmp_path, few_digits,
                                                                      moments):
    folder, reached = tmp_path / 'model', 0
    for number in range(3):
        process = fork('mnist_deep.py', '--max_steps=100000', '--data_dir', few_digits,
                       '--model_dir', folder, '--save_checkpoints_steps=1')
        if number:
            line = next_line(process)
            if ' is damaged (' in line:  # it was killed while it wrote this one
                reached, line = reached - 1, next_line(process)
            resumed = re.fullmatch(r'going on from step (\d+) of 100000\n', line)
            assert resumed and int(resumed[1]) >= reached > 0, line
        enough, reached = reached + 3, 0
        while reached < enough:  # a few steps on
            assert process.poll() is None, process.communicate()
            reached = max(map(model_dir.steps_of, model_dir.checkpoints(str(folder))), default=0)
            time.sleep(0.005)
        time.sleep(moments.random() / 5)
        process.kill()
        process.communicate()
    assert len(list(folder.glob('*.index'))) <= 3
    assert len(list(folder.glob('*tempstate*'))) <= 2


@pytest.mark.parametrize('precision, every, last', [
    ([], 5, 30), (['--bfloat16'], 1, 10)])
def test_a_killed_run_resumed_is_the_run_that_was_never_killed(precision, every, last, tmp_path,
                                                               few_digits, moments, capsys):
    flags = [*precision, '--seed=1', f'--max_steps={last}', f'--save_checkpoints_steps={every}',
             '--batch_size=5', f'--data_dir={few_digits}']
    mnist_deep.main([*flags, f'--model_dir={tmp_path / "whole"}'])
    lines = capsys.readouterr().out.splitlines()

    killed_at = moments.randint(1, last // every) * every
    process = fork('mnist_deep.py', *flags, '--model_dir', tmp_path / 'killed')
    while not (tmp_path / 'killed' / f'mnist_deep.ckpt-{killed_at}.index').exists():
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(moments.random() * every / 50)
    process.kill()
    printed = process.communicate()[0].splitlines()

    mnist_deep.main([*flags, f'--model_dir={tmp_path / "killed"}'])
    output, errors = capsys.readouterr()
    step = int(re.search(fr'^(?:going on from step|trained for) (\d+) (of {last}|steps already)$',
                         errors, re.MULTILINE)[1])
    assert step >= killed_at and (step % every == 0 or step == last)  # all since then are there
    again = output.splitlines()
    assert printed == lines[:len(printed)]
    assert again == lines[-len(again):] and len(printed) + len(again) >= len(lines)
    expected, found = (tf.train.load_checkpoint(str(tmp_path / name)) for name in
                       ('whole', 'killed'))
    names = expected.get_variable_to_shape_map()
    assert len(names) == 8 * 3 + 3  # Adam has two slots for each variable, and two powers
    for name in names:
        assert expected.get_tensor(name).tobytes() == found.get_tensor(name).tobytes(), name


def test_a_run_stopped_twice_and_extended_is_the_one_of_one_go(tmp_path, few_digits, capsys):
    printed = []
    for folder, ends in (('whole', [103]), ('parts', [3, 101, 103])):
        for end in ends:
            mnist_deep.main([f'--max_steps={end}', '--seed=2', '--batch_size=5',
                             f'--data_dir={few_digits}', f'--model_dir={tmp_path / folder}'])
        printed.append([line for line in capsys.readouterr().out.splitlines()
                        if line.startswith('step')])
    assert printed[0] == printed[1]
    expected, found = (tf.train.load_checkpoint(str(tmp_path / name)) for name in
                       ('whole', 'parts'))
    for name in expected.get_variable_to_shape_map():
        assert expected.get_tensor(name).tobytes() == found.get_tensor(name).tobytes(), name


def test_a_folder_with_another_model_is_refused_and_left(tmp_path, few_digits, capsys):
    weights = tf.Variable(tf.zeros([784, 10]))
    with tf.Session() as sess:
        sess.run(weights.initializer)
        tf.train.Saver().save(sess, str(tmp_path / 'mnist_deep.ckpt'), global_step=5)
    before = files(tmp_path)
    with pytest.raises(ValueError) as refused:
        mnist_deep.main([f'--data_dir={few_digits}', f'--model_dir={tmp_path}'])
    assert str(refused.value) == (f'--model_dir {tmp_path}: its checkpoint is of another network; '
                                  'name a new folder')
    assert capsys.readouterr() == ('', '')
    assert files(tmp_path) == {**before, '.lock': b''}


@pytest.mark.parametrize('name, content', [
    ('saved_model.pb', b'\x08\x01'), ('model.ckpt-5.index', b''),
    ('checkpoint', b'no text of a protocol buffer'),
    ('checkpoint', b'model_checkpoint_path: "gone-5"')])
def test_a_folder_with_something_else_is_refused_and_left(name, content, few_digits, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f'it holds {name}, and no checkpoint of this network; '
                       'name a new folder'):
        mnist_deep.main(['--model_dir', str(tmp_path), f'--data_dir={few_digits}'])
    assert files(tmp_path) == {name: content}


def test_what_a_disk_or_a_system_puts_there_is_no_content(train, tmp_path):
    folder = tmp_path / 'model'
    for name in ('lost+found', 'System Volume Information', '$RECYCLE.BIN', '@eaDir'):
        (folder / name).mkdir(parents=True)
    for name in ('.DS_Store', 'desktop.ini', 'Thumbs.db'):
        (folder / name).write_bytes(b'Bud1')
    assert 'test accuracy' in train('--max_steps=1').out
    assert train('--max_steps=1').err == 'trained for 1 steps already\n'


@pytest.mark.parametrize('name, message', [
    ('FILE', '--model_dir FILE: File exists'), ('', "--model_dir '': the name is empty; name a"),
    *[(url, f'--model_dir {url}: it is a URL; name a folder of this')
      for url in ('file:///d/model', 'ram://m', 'gs://b/m')],
    (os.fsdecode(b'm\xff'), '--model_dir .*: TensorFlow takes names in UTF-8 only;')])
def test_a_name_that_cannot_be_used_is_refused(name, message, few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'FILE').write_text('mine')
    with pytest.raises((OSError, ValueError), match=f'^{message}'):
        mnist_deep.main(['--model_dir', name, f'--data_dir={few_digits}'])
    assert os.listdir(tmp_path) == ['FILE']


@pytest.mark.parametrize('name, beside', [('[ab]', 'a'), ('m?x', 'mzx'), ('m*', 'model'),
                                          ('par[1]/model', 'par1/model'), (r'a\b', 'ab')])
def test_a_name_that_tensorflow_takes_for_a_pattern_is_refused_and_the_others_left(
        name, beside, tmp_path, four_steps, few_digits):
    shutil.copytree(four_steps, tmp_path / beside)
    before = files(tmp_path / beside)
    with pytest.raises(ValueError, match='TensorFlow takes .* for a pattern .*; name a folder'):
        mnist_deep.main(['--model_dir', str(tmp_path / name), f'--data_dir={few_digits}'])
    assert files(tmp_path / beside) == before
    assert not (tmp_path / name).exists()


def test_below_a_folder_of_such_a_name_a_relative_path_does(train, tmp_path, few_digits,
                                                            monkeypatch, capsys):
    (tmp_path / 'par[1]').mkdir()
    monkeypatch.chdir(tmp_path / 'par[1]')
    for end in (1, 2):
        mnist_deep.main([f'--max_steps={end}', f'--data_dir={few_digits}', '--model_dir=model'])
    assert capsys.readouterr().err == 'going on from step 1 of 2\n'


def test_a_tilde_is_the_home_folder(few_digits, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    mnist_deep.main(['--max_steps=1', '--data_dir', str(few_digits), '--model_dir=~/model'])
    assert (tmp_path / 'model' / 'mnist_deep.ckpt-1.index').exists()


def test_more_steps_than_asked_for_are_said_and_evaluated(train):
    accuracy = train('--max_steps=20', '--seed=1').out.splitlines()[-1]
    assert train('--max_steps=10') == (f'{accuracy}\n', 'trained for 20 steps already\n')


@pytest.mark.parametrize('damage', ['cut off', 'changed', 'index cut off', 'index empty', 'absent'])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(damage, four_steps, train,
                                                                       tmp_path):
    newest = shutil.copytree(four_steps, tmp_path / 'model') / 'mnist_deep.ckpt-4'
    file = pathlib.Path(f'{newest}.index' if 'index' in damage else f'{newest}.data-00000-of-00001')
    content = file.read_bytes()
    half = len(content) // 2
    if damage == 'absent':
        file.unlink()
    else:
        file.write_bytes({'changed': content[:half] + bytes(9999) + content[half + 9999:],
                          'index empty': b''}.get(damage, content[:half]))
    before = files(tmp_path / 'model')
    first, second = train('--max_steps=4', '--seed=1').err.splitlines()
    assert re.fullmatch(fr'{newest} is damaged \(.+\)', first)
    assert second == 'going on from step 2 of 4'
    assert before.items() - files(tmp_path / 'model').items() <= {
        (path.name, before[path.name]) for path in [file, tmp_path / 'checkpoint']
        if path.name in before}
    assert train('--max_steps=4').err == 'trained for 4 steps already\n'


def test_if_all_checkpoints_are_damaged_nothing_is_done(four_steps, train, tmp_path):
    shutil.copytree(four_steps, tmp_path / 'model')
    for index in (tmp_path / 'model').glob('*.index'):
        index.write_bytes(b'')
    before = files(tmp_path / 'model')
    with pytest.raises(ValueError, match='all its checkpoints are damaged; name a new folder'):
        train('--max_steps=5')
    assert files(tmp_path / 'model') == before


def test_a_lost_list_of_checkpoints_loses_none(four_steps, train, tmp_path):
    (shutil.copytree(four_steps, tmp_path / 'model') / 'checkpoint').unlink()
    assert train('--max_steps=5').err == 'going on from step 4 of 5\n'


def test_copies_beside_the_checkpoints_and_folders_of_odd_names_are_passed_over(four_steps, train,
                                                                                tmp_path):
    folder = shutil.copytree(four_steps, tmp_path / 'model')
    for name in ('4 (1)', '4 copy', '4-best', 'best-4'):
        shutil.copy(folder / 'mnist_deep.ckpt-4.index', folder / f'mnist_deep.ckpt-{name}.index')
    (folder / 'mnist_deep.ckpt-4.data-00000-of-00001.tempstate1').mkdir()
    left = folder / 'mnist_deep.ckpt-4.data-00000-of-00001.tempstate2'  # by an unfinished save
    left.write_bytes(b'half')
    assert train('--max_steps=5', '--seed=1').err == 'going on from step 4 of 5\n'
    assert not left.exists()


def test_weights_that_are_no_numbers_are_passed_over_as_damaged(four_steps, train, tmp_path):
    folder = shutil.copytree(four_steps, tmp_path / 'model')
    reader = tf.train.load_checkpoint(str(folder / 'mnist_deep.ckpt-4'))
    with tf.Graph().as_default(), tf.Session() as sess:
        variables = [tf.Variable(reader.get_tensor(name), name=name)
                     for name in reader.get_variable_to_shape_map()]
        sess.run(tf.global_variables_initializer())
        weights = next(v for v in variables if v.op.name == 'conv2/Variable')
        sess.run(weights[2, 2, 7, 3].assign(float('nan')))
        tf.train.Saver(variables).save(sess, str(folder / 'mnist_deep.ckpt'), 4,
                                       write_meta_graph=False)
    first, second = train('--max_steps=4', '--seed=1').err.splitlines()
    assert first == f'{folder}/mnist_deep.ckpt-4 is damaged (conv2/Variable is not a number)'
    assert second == 'going on from step 2 of 4'


@pytest.mark.filterwarnings('error::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_full_disk_costs_the_last_steps_alone(train, disk, monkeypatch, capsys):
    train('--max_steps=99')
    watch_batches(monkeypatch, lambda drawn: drawn == 1 and disk.fill())  # for step 100
    with pytest.raises(OSError) as refused:
        train('--max_steps=109', '--save_checkpoints_steps=4')
    assert str(refused.value) == (
        f'--model_dir {disk.folder}: the checkpoint of step 104 cannot be saved ({disk.reason}); '
        'that of step 100 is kept')
    assert list(disk.folder.glob('*tempstate*')) == []
    monkeypatch.undo()
    disk.empty()
    assert capsys.readouterr().err == 'going on from step 99 of 109\n'  # and no more, of TensorFlow
    assert train('--max_steps=101').err == 'going on from step 100 of 101\n'


def test_a_disk_that_is_full_before_is_told_before_the_first_step(four_steps, train, disk, capsys):
    shutil.copytree(four_steps, disk.folder, dirs_exist_ok=True)
    disk.fill()
    with pytest.raises(OSError) as refused:
        train('--max_steps=5')
    assert str(refused.value) == (f'--model_dir {disk.folder}: nothing can be written for '
                                  f'TensorBoard ({disk.reason})')
    disk.empty()
    capsys.readouterr()
    assert train('--max_steps=5').err == 'going on from step 4 of 5\n'


def test_on_a_full_disk_a_trained_network_is_tested(four_steps, train, disk):
    for path in four_steps.iterdir():
        if not path.name.startswith('events'):
            shutil.copy(path, disk.folder)
    disk.fill()
    output, errors = train('--max_steps=4')
    assert output.startswith('test accuracy 0.')
    assert errors.splitlines() == ['trained for 4 steps already', (
        f'--model_dir {disk.folder}: nothing can be written for TensorBoard ({disk.reason})')]


def test_if_the_events_alone_meet_a_full_disk_the_training_ends_in_one_line_and_is_kept(
        train, tmp_path, monkeypatch):
    def full(*arguments):  # as a quota on that file could: no disk is full for it alone
        raise tf.errors.ResourceExhaustedError(None, None, 'model/x; No space left on device')
    monkeypatch.setattr(tf.summary.FileWriter, 'add_summary', full)
    with pytest.raises(OSError) as refused:
        train('--max_steps=5')
    assert str(refused.value) == (f'--model_dir {tmp_path / "model"}: nothing can be written for '
                                  'TensorBoard (No space left on device)')
    assert (tmp_path / 'model' / 'mnist_deep.ckpt-1.index').exists()


OTHERS = {'.lock': b'', 'mnist_deep.ckpt-7.data-00000-of-00001.tempstate1': b'half'}


@pytest.mark.parametrize('others', [{}, OTHERS])  # of another training, which has begun there
@pytest.mark.parametrize('moment', ['before', 'while it trains'])
def test_a_folder_that_is_removed_meanwhile_ends_the_training_and_is_left(
        moment, others, four_steps, train, tmp_path, monkeypatch, capsys):
    folder = tmp_path / 'model'

    def remove(*_):
        shutil.rmtree(folder)
        for name, content in others.items():
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    if moment == 'before':  # the first step, in the seconds that repeating random numbers can take
        shutil.copytree(four_steps, folder)
        monkeypatch.setattr(model_dir, 'repeat_random_numbers', remove)
    else:
        watch_batches(monkeypatch, lambda step: step == 7 and remove())
    # At step 100 there is something for TensorBoard, at step 105 a checkpoint.
    code = mnist_deep.run(lambda: train('--max_steps=200', '--save_checkpoints_steps=105',
                                        '--seed=1'))
    assert code == 2
    assert capsys.readouterr().err.endswith(
        f'error: --model_dir {folder}: it, or .lock in it, was removed or renamed while this '
        'training used it, so nothing more is kept there; name another folder\n')
    assert (files(folder) if folder.exists() else {}) == others


def test_a_folder_that_is_removed_while_it_is_locked_is_refused(train, tmp_path, monkeypatch):
    def remove_first(*arguments, lock=fcntl.flock):
        shutil.rmtree(tmp_path / 'model')
        return lock(*arguments)
    monkeypatch.setattr(fcntl, 'flock', remove_first)
    with pytest.raises(OSError, match='it, or .lock in it, was removed or renamed'):
        train('--max_steps=5')


@pytest.mark.parametrize('hidden', ['', 'mnist_deep.ckpt-4.index',
                                    'mnist_deep.ckpt-4.data-00000-of-00001'])
def test_without_permission_to_read_it_that_is_said(hidden, four_steps):
    with tempfile.TemporaryDirectory(dir='/tmp') as everyones:
        os.chmod(everyones, 0o755)
        folder = shutil.copytree(four_steps, f'{everyones}/model')
        os.chmod(folder, 0o755)
        os.chmod(os.path.join(folder, hidden), 0)
        mnist_deep.deepnn(tf.placeholder(tf.float32, shape=[None, 784]))
        is_root = os.geteuid() == 0  # who may read everything: let somebody else read it
        with tf.Session(), pytest.raises(OSError, match=f'^--model_dir {folder}: Permission denied:'
                                         '.* may not be read; ask its owner'):
            try:
                if is_root:
                    os.seteuid(65534)
                model_dir.restore_newest(folder)
            finally:
                if is_root:
                    os.seteuid(0)
                os.chmod(folder, 0o755)


def test_event_files_that_cannot_be_read_are_passed_over(four_steps, train, tmp_path):
    folder = shutil.copytree(four_steps, tmp_path / 'model')
    (folder / 'events.out.tfevents.1.folder').mkdir()
    assert train('--max_steps=4').out.startswith('test accuracy 0.')


def test_without_its_lock_a_folder_that_can_be_written_is_refused(four_steps, train, tmp_path):
    lock = shutil.copytree(four_steps, tmp_path / 'model') / '.lock'
    lock.unlink()
    lock.mkdir()  # cannot be opened, not even by root
    with pytest.raises(OSError, match='its file .lock, .* cannot be opened .*; name another'):
        train('--max_steps=5')


def test_a_loss_that_is_no_number_ends_the_training_and_is_not_kept(train, tmp_path):
    with pytest.raises(ValueError, match='^at step 10 the loss is not a number, so nothing is '
                                         'saved; try a smaller --learning_rate$'):
        train('--max_steps=200', '--learning_rate=1e30', '--save_checkpoints_steps=10')
    assert list((tmp_path / 'model').glob('*.index')) == []


# Stopping

@pytest.mark.parametrize('number, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143),
                                          (signal.SIGHUP, 129)])
def test_a_signal_saves_what_there_is_and_the_exit_code_says_which(number, code, train, tmp_path,
                                                                   monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        signals_at({7: number}, monkeypatch)
        assert mnist_deep.run(lambda: train('--max_steps=50')) == code
    finally:
        signal.signal(signal.SIGHUP, hangup)
    assert capsys.readouterr().err == f'stopped at step 8, kept in {tmp_path / "model"}\n'
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    monkeypatch.undo()
    assert train('--max_steps=9').err == 'going on from step 8 of 9\n'


def test_a_hangup_that_is_ignored_as_after_nohup_stays_so(train, monkeypatch):
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals_at({2: signal.SIGHUP}, monkeypatch)
        assert 'test accuracy' in train('--max_steps=5').out
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_when_saving_fails_after_a_signal_the_error_is_told(train, disk, monkeypatch, capsys):
    def fill_and_stop(step):
        if step == 2:
            disk.fill()
            signal.raise_signal(signal.SIGINT)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    watch_batches(monkeypatch, fill_and_stop)
    assert mnist_deep.run(lambda: train('--max_steps=50')) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.endswith(f'the checkpoint of step 3 cannot be saved ({disk.reason}); '
                         'there is no earlier one')
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path, few_digits):
    # The first one comes while a step is drawn that never ends.
    script = ('import signal, time, input_data, mnist_deep\n'
              'def endless(*args):\n'
              '    signal.raise_signal(signal.SIGINT)\n'
              '    print("held back", flush=True)\n'
              '    time.sleep(1000)\n'
              'input_data.DataSet.next_batch = endless\n'
              f'mnist_deep.main(["--data_dir={few_digits}", "--model_dir={tmp_path / "model"}"])\n')
    process = fork('-c', script)
    assert process.stdout.readline() == 'held back\n'
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT


# Saves as usual, and gets more signals meanwhile.
SIGNALS_WHILE_IT_SAVES = """
import signal, input_data, mnist_deep, model_dir
draw, save = input_data.DataSet.next_batch, model_dir.tf.train.Saver.save
def next_batch(*arguments):
    signal.raise_signal(signals[0])
    return draw(*arguments)
def saves(*arguments, **options):
    for number in signals[1:]:
        signal.raise_signal(number)
    return save(*arguments, **options)
input_data.DataSet.next_batch, model_dir.tf.train.Saver.save = next_batch, saves
raise SystemExit(mnist_deep.run(mnist_deep.main))
"""


@pytest.mark.parametrize('signals, code', [
    ((signal.SIGHUP, signal.SIGHUP), 129),  # as a terminal that is closed sends it
    ((signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM), 143),
    ((signal.SIGINT, signal.SIGINT), -signal.SIGINT)])  # a person who does not want to wait
def test_only_a_second_ctrl_c_ends_it_while_it_saves(signals, code, tmp_path, few_digits):
    folder = tmp_path / 'model'
    process = fork('-c', f'signals = {tuple(map(int, signals))}\n{SIGNALS_WHILE_IT_SAVES}',
                   '--data_dir', few_digits, '--model_dir', folder)
    errors = own_lines(process.communicate(timeout=60)[1])
    assert process.returncode == code
    kept = [f'stopped at step 1, kept in {folder}'] if code > 0 else []
    assert errors.splitlines() == kept
    assert (folder / 'mnist_deep.ckpt-1.index').exists() == bool(kept)


def test_an_exception_of_others_leaves_the_usual_signals_behind_though_it_is_kept(train,
                                                                                  monkeypatch):
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail(step):
        if step == 2:
            raise RuntimeError('not ours')
    watch_batches(monkeypatch, fail)
    with pytest.raises(RuntimeError) as kept:  # as a shell keeps it, with all its frames
        train('--max_steps=5')
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == usual
    assert kept.tb is not None


def test_when_nobody_takes_its_output_it_saves_and_ends(tmp_path, few_digits, train):
    process = start('mnist_deep.py', '--max_steps=100000', '--batch_size=5',
                    '--data_dir', few_digits, '--model_dir', tmp_path / 'model')
    assert process.stdout.readline().startswith('step 0,')
    process.stdout.close()  # as by `| head -1`
    assert process.wait(60) == 2
    assert own_lines(process.stderr.read()) == 'mnist_deep.py: error: [Errno 32] Broken pipe\n'
    assert train('--max_steps=100').err == 'trained for 100 steps already\n'


def test_when_its_output_is_full_it_ends(few_digits, monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        with pytest.raises(OSError, match='No space left on device'):
            mnist_deep.main(['--data_dir', str(few_digits)])
        monkeypatch.undo()
        with pytest.raises(OSError):  # closing it tries once more
            full.close()


def test_a_closed_standard_error_changes_nothing(train, monkeypatch):
    output, again = train('--max_steps=3', '--seed=1').out, []
    monkeypatch.setattr(sys, 'stderr', None)  # as Python has it after 2>&-
    mnist_deep.run(lambda: again.append(train('--max_steps=3', '--seed=1').out))
    assert again == [output.splitlines(keepends=True)[-1]]  # no notice that it was trained already


# TensorBoard

def test_curves_have_a_point_every_100_steps(trained):
    folder, output = trained
    for tag in ('cross_entropy', 'training_accuracy', 'W_conv1', 'W_conv1_filters/image/0'):
        steps = [step for step, name, _ in values(folder) if name == tag]
        assert steps == [0, 100], tag
    shown = [value.simple_value for _, tag, value in values(folder) if tag == 'training_accuracy']
    printed = [float(number) for number in re.findall('training accuracy (.*)', output)]
    assert shown == pytest.approx(printed)


def test_the_first_layers_filters_are_a_picture_of_4_rows_of_8(trained):
    folder, _ = trained
    picture = [value.image for _, tag, value in values(folder) if 'filters' in tag][-1]
    assert (picture.height, picture.width) == (4 * 6, 8 * 6)


def test_every_mistake_is_an_image_that_says_what_it_was_taken_for(trained):
    folder, output = trained
    mistakes = [(tag, value.image) for _, tag, value in values(folder) if 'mistakes' in tag]
    accuracy = float(re.search('test accuracy (.*)', output)[1])
    assert len(mistakes) == round((1 - accuracy) * 10000)
    test = input_data.read_data_sets(DATA, dtype='uint8', reshape=False).test
    with tf.Session() as sess:
        for tag, image in mistakes[:20]:
            label, guess, number = map(int, re.fullmatch(
                r'mistakes/(\d)_taken_for_(\d)/test_image_(\d+)', tag).groups())
            assert label == test.labels[number] != guess
            pixels = sess.run(tf.image.decode_png(image.encoded_image_string))
            assert (pixels == test.images[number]).all()


def test_mistakes_that_are_missing_are_written_by_a_run_that_only_evaluates(train, tmp_path,
                                                                            monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(model_dir.Events, 'write_mistakes', stopped)
        train('--max_steps=2')
    for _ in range(2):  # the second time, there is nothing to add
        train('--max_steps=2')
        before = files(tmp_path / 'model')
        mistakes = [tag for _, tag, _ in values(tmp_path / 'model') if 'mistakes' in tag]
        assert len(mistakes) > 100 and len(mistakes) == len(set(mistakes))
    train('--max_steps=2')
    assert files(tmp_path / 'model') == before


def test_the_graph_shows_its_name_scopes(trained):
    folder, _ = trained
    definition = tf.GraphDef()
    definition.ParseFromString(next(event.graph_def for event in events(folder)
                                    if event.HasField('graph_def')))
    scopes = {node.name.split('/')[0] for node in definition.node}
    assert scopes >= {'reshape', 'conv1', 'pool1', 'conv2', 'pool2', 'fc1', 'dropout', 'fc2',
                      'loss', 'adam_optimizer', 'accuracy'}


def test_a_resumed_run_voids_what_was_written_of_later_steps(tmp_path, few_digits):
    for steps in (5, 7):
        mnist_deep.main([f'--max_steps={steps}', f'--data_dir={few_digits}',
                         f'--model_dir={tmp_path}'])
    starts = [event.step for event in events(tmp_path)
              if event.session_log.status == tf.SessionLog.START]
    assert starts == [0, 5]


