"""The benchmarks: they run, and their tables have every contestant."""

import json
import subprocess
import types

import pytest
from conftest import ENVIRONMENT, ROOT, python
from forks import Fork

import mnist_deep
from benchmarks import contestants, run

# A contestant for itself, where TensorFlow 1.x's ways are switched off again.
AS_IN_2_X = (
    'import runpy, tensorflow as tf; tf.compat.v1.enable_v2_behavior()\n'
    'runpy.run_module("benchmarks.contestants", run_name="__main__")')


@pytest.fixture(scope='module')
def results(trained, few_digits):
    """What each benchmark finds with --quick, by name; scripts train on few digits."""
    def contestant(command, **_):
        function, arguments = command[-2:]
        if function in ('step_keras', 'step_torch'):  # not beside our TensorFlow 1.x
            process = Fork('-c', AS_IN_2_X, function, arguments, cwd=ROOT, env=ENVIRONMENT)
            output, errors = process.communicate()
            return subprocess.CompletedProcess(command, process.returncode, output, errors)
        arguments = json.loads(arguments)
        for name in {'flags', 'command'} & arguments.keys():  # of a script that trains
            arguments[name].append(f'--data_dir={few_digits}')
        with mnist_deep.tf.Graph().as_default(), pytest.MonkeyPatch.context() as patch:
            if function == 'evaluation':
                patch.setattr(contestants, 'DATA', few_digits)
            found = getattr(contestants, function)(**arguments)
        return subprocess.CompletedProcess(command, 0, json.dumps(found), '')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, 'subprocess', types.SimpleNamespace(run=contestant))
        patch.setattr(contestants, 'start', Fork)
        return {name: benchmark(True, str(trained[0]))
                for name, benchmark in run.BENCHMARKS.items()}


def test_every_benchmark_has_a_figure_above_0_of_each_kind_of_contestant(results):
    for result, count in zip(results.values(), [2, 3, 1, 1, 2, 1]):
        for reason in result['failures'].values():
            assert reason.startswith('skipped')
        assert len(result['medians']) + len(result['failures']) == count
        for name, figures in result['medians'].items():
            assert figures
            for figure, value in figures.items():
                # A few pictures take less time than that by which two start-ups differ, and
                # mnist_deep.py sends nothing.
                assert value > 0 or figure == 'pictures per s' or (
                    name, figure) == ('mnist_deep.py', 'loopback MB per step'), (name, figure)


def test_tables_are_markdown_with_rows_of_one_width(results):
    for result in results.values():
        result = {**result, 'ratios': [{'of': 'one to two', 'median': 1.0, 'all': [0.9, 1.0, 1.1]},
                                       {'of': 'once', 'median': 2.0, 'all': [2.0]}]}
        title, *tables = run.table(result).split('\n\n')
        assert title == f'**{result["title"]}**' and len(tables) == 2
        assert '| one to two | 1.00 (0.90 to 1.10) |\n| once | 2.00 |' in tables[1]
        for table in tables:
            assert len({line.count('|') for line in table.splitlines()}) == 1
            assert set(table.splitlines()[1]) == set('|-:')
        for name in [*result['medians'], *result['failures']]:
            assert f'| {name} | ' in tables[0]


def test_ratios_are_taken_within_a_round(monkeypatch):
    figures = iter([2, 4, 9, 3])
    monkeypatch.setattr(run.subprocess, 'run', lambda *args, **kwargs: subprocess.CompletedProcess(
        args, 0, json.dumps({'s': next(figures)}), ''))
    result = run.compete('Title', {'a': (None, 'f', {}), 'b': (None, 'f', {})}, 2,
                         [('s', 'a', 'b')])
    assert result['ratios'] == [{'of': 's: a to b', 'all': [0.5, 3], 'median': 1.75}]
    assert result['medians'] == {'a': {'s': 5.5}, 'b': {'s': 3.5}}


def test_the_command_runs_one_benchmark_alone():
    result = python('-m', 'benchmarks.run', '--quick', '--only=loader')
    assert result.returncode == 0
    assert result.stdout.count('**') == 2 and '| this project | ' in result.stdout


@pytest.mark.parametrize('number, shown', [
    (None, ''), (0.18432, '0.184'), (15.317, '15.3'), (98.98, '99.0'), (2605.4, '2,605')])
def test_figures_have_no_more_digits_than_they_are_worth(number, shown):
    assert run.digits(number) == shown


def test_a_script_that_fails_fails_its_contestant(monkeypatch):
    monkeypatch.setattr(contestants, 'start', Fork)
    for function, arguments in ((contestants.whole_run, (0, [])),
                                (contestants.training, (0, 5, ['mnist_deep.py']))):
        with pytest.raises(RuntimeError, match='mnist_deep.py.* ended with code 2'):
            function(*arguments)


def test_a_contestant_that_fails_is_reported_not_left_out():
    result = run.compete('Title', {'bad': (None, 'loader_ours', {'epochs': 'ten'}),
                                   'absent': ('no_such_package', 'loader_ours', {})},
                         2, [('load s', 'bad', 'absent')])
    assert result['failures']['bad'].startswith('failed with code 1: ')
    assert result['failures']['absent'] == 'skipped: no_such_package is not installed'
    assert '| bad | failed' in run.table(result)


def test_the_1x_way_draws_every_example_once_an_epoch(monkeypatch):
    drawn = []
    monkeypatch.setattr(contestants, 'run_loader', lambda load, epochs: drawn.append(load()))
    contestants.loader_1x(1)
    train = drawn[0]
    total = sum(train.next_batch(50)[0].sum(dtype=float) for _ in range(1100))
    assert total == pytest.approx(train.images.sum(dtype=float))
