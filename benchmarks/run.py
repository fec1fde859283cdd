"""The costs of this project beside those of what people would use instead; see README.md here.

Each contestant runs in a process of its own, in rounds: A B A B ... The tables, in Markdown, have
medians over the rounds, and ratios within a round: their median, and the smallest and the largest.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def compete(title, contestants, rounds, ratios, quick=False):
    """Runs the contestants in rounds; returns the benchmark's results.

    Args:
        title: of the table.
        contestants: name -> (package that it needs or None, function in contestants.py, arguments).
        rounds: how often each one runs.
        ratios: (figure, name, other name): what to divide by what.
        quick: True for one round of one contestant of each function.
    """
    if quick:
        contestants = dict({one[1]: (name, one)
                            for name, one in reversed(contestants.items())}.values())
        rounds, ratios = 1, []
    results = {name: [] for name in contestants}
    failures = {}
    for number in range(rounds):
        for name, (package, function, arguments) in contestants.items():
            if package and importlib.util.find_spec(package) is None:
                failures[name] = f'skipped: {package} is not installed'
            if name in failures:
                continue
            print(f'{title}, round {number + 1} of {rounds}: {name}', file=sys.stderr)
            process = subprocess.run(
                [sys.executable, '-m', 'benchmarks.contestants', function, json.dumps(arguments)],
                cwd=ROOT, capture_output=True, text=True, check=False)
            if process.returncode:
                said = process.stderr.strip().rpartition('\n')[2] or 'no message'
                failures[name] = f'failed with code {process.returncode}: {said}'
                continue
            result = json.loads(process.stdout.splitlines()[-1])
            if 'skipped' in result:
                failures[name] = f'skipped: {result["skipped"]}'
            else:
                results[name].append(result)

    medians = {name: {figure: statistics.median(result[figure] for result in found)
                      for figure in found[0]} for name, found in results.items() if found}
    compared = []
    for figure, name, other in ratios:
        values = [one[figure] / two[figure] for one, two in zip(results[name], results[other])]
        if values:
            compared.append({'of': f'{figure}: {name} to {other}', 'all': values,
                             'median': statistics.median(values)})
    return {'title': title, 'medians': medians, 'failures': failures, 'ratios': compared}


def table(result):
    """A benchmark's results as Markdown, with three digits."""
    figures = list(dict.fromkeys(figure for found in result['medians'].values()
                                 for figure in found))
    lines = [f'**{result["title"]}**', '', '| | ' + ' | '.join(figures) + ' |',
             '|---|' + '---:|' * len(figures)]
    for name, found in result['medians'].items():
        shown = ' | '.join(digits(found.get(figure)) for figure in figures)
        lines.append(f'| {name} | {shown} |')
    lines += [f'| {name} | {reason} |' + ' |' * (len(figures) - 1)
              for name, reason in result['failures'].items()]
    if result['ratios']:
        lines += ['', '| ratio | median |', '|---|---:|']
    for ratio in result['ratios']:
        least, most = min(ratio['all']), max(ratio['all'])
        spread = f' ({least:.2f} to {most:.2f})' if len(ratio['all']) > 1 else ''
        lines.append(f'| {ratio["of"]} | {ratio["median"]:.2f}{spread} |')
    return '\n'.join(lines)


def digits(number):
    """About three digits of a number, as text; None is empty."""
    if number is None:
        return ''
    return f'{number:.3g}' if number < 10 else f'{number:,.{int(number < 100)}f}'


def machine():
    """One line: processor, threads, versions."""
    model = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            model = next((line.split(':')[1].strip() for line in f if 'model name' in line), model)
    packages = importlib.metadata.packages_distributions()  # keras may be of keras-nightly
    versions = [f'{name} {importlib.metadata.version(packages[name][0])}' for name in (
        'tensorflow', 'keras', 'numpy', 'torch') if name in packages]
    return (f'{datetime.date.today()}; {model}, {os.cpu_count()} threads for each contestant; '
            f'Python {platform.python_version()}, {", ".join(versions)}')


def loader(quick, _):
    """Loading and minibatches."""
    ours, old, epochs = 'this project', 'the 1.x way', {'epochs': 1 if quick else 20}
    return compete('Loader', {
        ours: (None, 'loader_ours', epochs), old: (None, 'loader_1x', epochs)}, 3,
        [(figure, ours, old) for figure in ('load s', 'batch us', 'memory MB')], quick)


def step(quick, _):
    """A training step."""
    steps = {'steps': 5 if quick else 150}
    ours, ours16 = 'this project, float32', 'this project, bfloat16'
    return compete('Training step of the convolutional network, batch 50', {
        ours: (None, 'step_ours', steps),
        ours16: (None, 'step_ours', {**steps, 'bfloat16': True}),
        'Keras fit': ('keras', 'step_keras', steps),
        'PyTorch': ('torch', 'step_torch', steps)}, 3,
        [('step ms', ours, 'Keras fit'), ('step ms', ours, 'PyTorch'), ('step ms', ours16, ours)],
        quick)


def evaluation(quick, _):
    """The test accuracy."""
    one, other = 'in batches of 200', 'all at once'
    return compete('Test accuracy of 10,000 images', {
        one: (None, 'evaluation', {'at_once': False}),
        other: (None, 'evaluation', {'at_once': True})}, 3,
        [(figure, one, other) for figure in ('evaluation s', 'peak MB')], quick)


def whole(quick, _):
    """mnist_deep.py from start to end."""
    steps, kept = 3 if quick else 1000, '--model_dir=FOLDER/model'
    flags = {'float32': [], 'float32, --model_dir': [kept], 'bfloat16': ['--bfloat16'],
             'bfloat16, --model_dir': ['--bfloat16', kept]}
    return compete(f'mnist_deep.py, {steps:,} steps', {
        name: (None, 'whole_run', {'steps': steps, 'flags': flags[name]}) for name in flags},
        3,
        [('s', 'bfloat16', 'float32'), ('s', 'float32, --model_dir', 'float32')], quick)


def pictures(quick, model_dir):
    """extras.predict, with a fully trained network."""
    one = {'model_dir': model_dir, 'digits': 20 if quick else 500}
    contestants = {name: (None, 'reading', {**one, 'way': way}) for name, way in (
        ('pasted digits, normalised', 'normalised'), ('pasted digits, resized', 'resized'),
        ("MNIST's digits themselves", 'directly'))}
    for name, height, width, count in (('drawings, 280x280', 280, 280, 4 if quick else 200),
                                       ('photographs, 12 megapixels', 3000, 4000,
                                        1 if quick else 20)):
        contestants[name] = None, 'predict', {'model_dir': model_dir, 'height': height,
                                              'width': width, 'pictures': count}
    return compete('extras.predict', contestants, 1, [], quick)


def workers(quick, _):
    """extras.replica: 2 cores show what the wire costs, not how it scales."""
    alone, one, two = 'mnist_deep.py', '1 ps, 1 worker', '1 ps, 2 workers'
    steps = {'steps': 101 if quick else 1001, 'batch': 5 if quick else 50}
    return compete('extras.replica', {
        name: (None, 'training', {**steps, 'command': command})
        for name, command in ((alone, ['mnist_deep.py']),
                              (one, ['-m', 'extras.replica', '--workers=1']),
                              (two, ['-m', 'extras.replica', '--workers=2']))},
        3, [('step ms', one, alone), ('images per s', two, one)], quick)


BENCHMARKS = {'loader': loader, 'step': step, 'evaluation': evaluation, 'whole': whole,
              'pictures': pictures, 'workers': workers}


def main():
    parser = argparse.ArgumentParser(description='Prints the tables of benchmarks/README.md.')
    parser.add_argument('--quick', action='store_true',
                        help='half a minute: one contestant of each kind, in small')
    parser.add_argument('--only', choices=BENCHMARKS, help='one benchmark alone')
    parser.add_argument('--model_dir', metavar='FOLDER', default='model', help='the network that '
                        'reads pictures, trained by mnist_deep.py (default: %(default)s)')
    flags = parser.parse_args()

    print(machine(), end='\n\n')
    results = []
    for name, benchmark in BENCHMARKS.items():
        if flags.only in (None, name):
            results.append(benchmark(flags.quick, flags.model_dir))
            print(table(results[-1]), end='\n\n', flush=True)
    return any('failed' in reason for result in results for reason in result['failures'].values())


if __name__ == '__main__':
    sys.exit(main())
