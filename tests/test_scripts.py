"""What both scripts have in common: flags, errors, a clean screen, seeds, Ctrl-C."""

import concurrent.futures
import importlib
import os
import re
import runpy
import shutil
import signal
import sys

import pexpect
import pytest
from conftest import DATA, ENVIRONMENT, ROOT, fork, python, watch_batches, write_data_set

SCRIPTS = ['mnist_softmax.py', 'mnist_deep.py']
both = pytest.mark.parametrize('script', SCRIPTS)
FLAGS = {'mnist_softmax.py': ['--max_steps=200'],
         'mnist_deep.py': ['--max_steps=110', '--batch_size=10']}

# Flags, and what the one line on standard error must say.
REFUSED = [
    (['--max_steps=0'], 'argument --max_steps: 0 is not a number above 0'),
    (['--max_steps=-1'], 'argument --max_steps: -1 is not a number above 0'),
    (['--max_steps=ten'], "argument --max_steps: invalid int value: 'ten'"),
    (['--max_steps=1.5'], "argument --max_steps: invalid int value: '1.5'"),
    (['--batch_size=0'], 'argument --batch_size: 0 is not a number above 0'),
    (['--learning_rate=0'], 'argument --learning_rate: 0.0 is not a number above 0'),
    (['--learning_rate=-0.5'], 'argument --learning_rate: -0.5 is not a number above 0'),
    (['--learning_rate=nan'], 'argument --learning_rate: nan is not a number above 0'),
    (['--learning_rate=1e39'], 'argument --learning_rate: 1e+39 is not a number above 0'),
    (['--seed=one'], 'argument --seed: '),
    (['--steps=5'], 'unrecognized arguments: --steps=5'),
    (['5'], 'unrecognized arguments: 5'),
    (['--data_dir=FILE'], 'and the folder FILE cannot be written to (File exists): name another'),
    (['--data_dir=SMALL'], 'validation_size is 5000, expected 0 to 60'),
    (['--data_dir=OTHER'], ', 63) for Tensor '),
    (['--data_dir=DAMAGED'], 't10k-labels-idx1-ubyte.gz is damaged'),
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A working folder with what the flags above name."""
    folder = tmp_path_factory.mktemp('refused')
    write_data_set(folder / 'SMALL')
    write_data_set(folder / 'OTHER', train=5100)
    write_data_set(folder / 'DAMAGED', train=5100)
    (folder / 'DAMAGED' / 't10k-labels-idx1-ubyte.gz').write_bytes(b'<html>')
    (folder / 'FILE').write_text('')
    return folder


@both
@pytest.mark.parametrize('flags, message', REFUSED)
def test_bad_flags_are_exceptions_that_say_what_to_change(script, flags, message, folder,
                                                          monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [script])  # argparse's lines begin with it
    with pytest.raises((OSError, ValueError, SystemExit)) as caught:
        importlib.import_module(script.removesuffix('.py')).main(flags)
    output, errors = capsys.readouterr()
    if caught.type is SystemExit:  # what argparse itself refuses
        assert caught.value.code == 2
        usage, line = errors.splitlines()
        assert usage == f'usage: {script} [flags]'
        assert line.startswith(f'{script}: error: ') and message in line
    else:
        assert message in str(caught.value) and '\n' not in str(caught.value)
        assert errors == ''
    assert output == ''


@both
def test_on_the_command_line_they_are_one_line(script, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, 'argv', [script, '--data_dir=OTHER'])
    with pytest.raises(SystemExit, match='^2$'):
        runpy.run_path(str(ROOT / script), run_name='__main__')
    output, errors = capsys.readouterr()
    assert output == ''
    line, = errors.splitlines()
    assert line.startswith(f'{script}: error: ') and ', 63) for Tensor ' in line


@both
def test_help_tells_every_flag_with_its_default(script, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit, match='^0$'):
        importlib.import_module(script.removesuffix('.py')).main(['--help'])
    output, errors = capsys.readouterr()
    flags = re.findall(r'^  (--\w+)', output, re.MULTILINE)
    assert flags[:5] == ['--data_dir', '--max_steps', '--batch_size', '--learning_rate', '--seed']
    defaults = re.findall(r'\(default: (.+)\)', output)
    assert len(defaults) == (4 if script == 'mnist_softmax.py' else 5) and 'None' not in defaults
    assert str(DATA) in output and errors == ''


@pytest.fixture(scope='module', params=SCRIPTS)
def alone(request, tmp_path_factory, few_digits):
    """A script, and what it does in a process of its own: with the loader alone, elsewhere."""
    folder, script = tmp_path_factory.mktemp('alone'), request.param
    for name in (script, 'input_data.py'):
        shutil.copy(ROOT / name, folder)
    (folder / 'MNIST_data').symlink_to(few_digits)
    working = folder / 'elsewhere'
    working.mkdir()
    result = python(folder / script, '--seed=1', *FLAGS[script], cwd=working)
    assert not list(working.iterdir())
    return script, result


def test_stands_alone_runs_from_any_folder_and_shows_the_tutorials_lines_alone(alone):
    script, result = alone
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    if script == 'mnist_deep.py':
        for step in (0, 100):
            assert re.fullmatch(fr'step {step}, training accuracy [01](\.\d+)?', lines.pop(0))
    assert re.fullmatch(r'test accuracy 0\.\d+', lines.pop())
    assert lines == []
    assert result.stderr == ''


@both
def test_a_log_level_of_the_users_own_is_kept(script, monkeypatch):
    for users_own, level in (('0', '0'), (None, '3')):
        if users_own:
            monkeypatch.setenv('TF_CPP_MIN_LOG_LEVEL', users_own)
        else:
            monkeypatch.delenv('TF_CPP_MIN_LOG_LEVEL', raising=False)
        runpy.run_path(str(ROOT / script))
        assert os.environ['TF_CPP_MIN_LOG_LEVEL'] == level


def test_the_same_seed_prints_the_same_in_any_process_and_thread_and_another_does_not(
        alone, few_digits, capsys):
    script, fresh = alone[0], alone[1].stdout
    module = importlib.import_module(script.removesuffix('.py'))
    flags = [*FLAGS[script], '--data_dir', str(few_digits)]
    assert 'test accuracy' in fresh
    with module.tf.Graph().as_default() as mine:
        module.main([*flags, '--max_steps=10'])  # a run without a seed changes nothing
        assert mine.get_operations() == []
    capsys.readouterr()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(module.main, ['--seed=1', *flags]).result()
    assert capsys.readouterr().out == fresh
    module.main(['--seed=2', *flags])
    assert capsys.readouterr().out != fresh


@both
def test_called_through_a_link_it_finds_its_data(script, tmp_path, monkeypatch, capsys):
    (tmp_path / script).symlink_to(ROOT / script)
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys, 'argv', [script, '--help'])
    with pytest.raises(SystemExit, match='^0$'):
        runpy.run_path(str(tmp_path / script), run_name='__main__')
    assert f'(default: {DATA})' in capsys.readouterr().out


def test_the_first_part_ends_by_ctrl_c_as_any_python_script_does(few_digits, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['mnist_softmax.py', f'--data_dir={few_digits}'])
    drawn = watch_batches(monkeypatch,
                          lambda step: step == 50 and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):  # on which Python ends
        runpy.run_path(str(ROOT / 'mnist_softmax.py'), run_name='__main__')
    assert list(map(len, drawn.values())) == [50]


def test_on_a_terminal_progress_shows_and_ctrl_c_ends_it_as_it_ends_any_program(tmp_path):
    child = pexpect.spawn(sys.executable, ['mnist_deep.py', '--max_steps=10000000000000000000'],
                          cwd=str(ROOT), env=ENVIRONMENT, encoding='utf-8', timeout=120)
    child.expect(r'\r\d+ steps/s, \d+:\d\d left *\r')
    child.sendintr()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.signalstatus == signal.SIGINT  # a shell says 130
    assert 'Traceback' not in child.before


@both
@pytest.mark.parametrize('module', ['input_data', 'numpy', 'tensorflow'])
def test_ctrl_c_while_modules_still_load_is_as_in_any_python_script(script, module, tmp_path):
    (tmp_path / 'sitecustomize.py').write_text(
        'import os, signal, sys\n'
        'class Interrupt:\n'
        '    def find_spec(self, name, *_):\n'
        f'        if name == "{module}":\n'
        '            os.kill(os.getpid(), signal.SIGINT)\n'
        'sys.meta_path.insert(0, Interrupt())\n')
    result = python(script, env={**ENVIRONMENT, 'PYTHONPATH': str(tmp_path)})
    assert (result.returncode, result.stdout) == (-signal.SIGINT, '')  # a shell says 130
    assert result.stderr.endswith('\nKeyboardInterrupt\n')


def test_nothing_is_written_to_a_pipe_but_lines_as_they_come(few_digits):
    process = fork('mnist_deep.py', '--max_steps=2000', '--batch_size=5', '--data_dir', few_digits)
    assert process.stdout.readline().startswith('step 0, training accuracy ')
    process.terminate()
    assert process.communicate(timeout=60)[0] == ''
    assert process.returncode == -signal.SIGTERM
