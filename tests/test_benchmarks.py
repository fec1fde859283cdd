"""The benchmarks: they run, and their tables have every contestant."""

import json
import sys

import pytest
from conftest import ROOT, python

sys.path.insert(0, str(ROOT / 'benchmarks'))
import contestants
import run


@pytest.fixture(scope='module')
def quick(tmp_path_factory, trained):
    """What `--quick` prints, and the figures that it writes."""
    file = tmp_path_factory.mktemp('benchmarks') / 'figures.json'
    result = python('benchmarks/run.py', '--quick', '--model_dir', trained[0], '--json', file)
    assert result.returncode == 0, result.stdout
    return result.stdout, json.loads(file.read_text())['results']


def test_every_benchmark_has_a_table_of_all_its_contestants(quick):
    output, results = quick
    assert [result['title'] for result in results] == [
        'Loader, MNIST', 'Loader, synthetic images', 'Training step of the CNN, batch 50',
        'Test evaluation', 'mnist_deep.py', 'Pasted digits of 28 to 1,000 pixels',
        'mnist_predict.py', 'mnist_replica.py']
    for result, count in zip(results, [3, 2, 6, 2, 4, 3, 2, 3]):
        names = [*result['medians'], *result['failures']]
        assert len(names) == count
        for name in names:
            assert f'| {name} | ' in output
        for reason in result['failures'].values():
            assert reason.startswith('skipped')


def test_tables_are_markdown_with_rows_of_one_width(quick):
    tables = [part for part in quick[0].split('\n\n') if part.startswith('|')]
    assert len(tables) >= 8
    for table in tables:
        assert len({line.count('|') for line in table.splitlines()}) == 1
        assert set(table.splitlines()[1]) == set('|-:')


def test_every_figure_is_positive(quick):
    for result in quick[1]:
        for name, figures in result['medians'].items():
            assert figures
            for figure, value in figures.items():
                # A few pictures take less time than that by which two start-ups differ.
                assert value > 0 or figure == 'pictures per s', (name, figure)
        for ratio in result['ratios']:
            assert 0 < ratio['least'] <= ratio['median'] <= ratio['most']


def test_a_contestant_that_fails_is_reported_not_left_out():
    result = run.compete('Title', {'bad': (None, 'loader_ours', {'epochs': 1, 'folder': '/dev'}),
                                   'absent': ('no_such_package', 'loader_ours', {})},
                         2, [('bad', 'load s', 'absent', 'load s', 1)], lambda line: None)
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


def test_floating_point_operations_are_counted_from_the_shapes():
    assert contestants.STEP_FLOP == pytest.approx(4.1e9, rel=0.01)
