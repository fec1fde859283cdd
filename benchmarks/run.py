"""The costs of this project beside those of what people would use instead.

    pip install -r benchmarks/requirements.txt
    python benchmarks/run.py

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
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import numpy as np  # noqa: E402 (the path comes first)

import input_data  # noqa: E402


def compete(title, contestants, rounds, ratios, note):
    """Runs the contestants in rounds; returns the benchmark's results.

    Args:
        title: of the table.
        contestants: name -> (package that it needs or None, function in contestants.py, arguments).
        rounds: how often each one runs.
        ratios: (name, figure, other name, other figure, bound or None): what to divide by what.
        note: takes a line that says what happens.
    """
    results = {name: [] for name in contestants}
    failures = {}
    for number in range(rounds):
        for name, (package, function, arguments) in contestants.items():
            if package and importlib.util.find_spec(package) is None:
                failures[name] = f'skipped: {package} is not installed'
            if name in failures:
                continue
            note(f'{title}, round {number + 1} of {rounds}: {name}')
            if function == 'whole_run':
                arguments = {**arguments, 'began': time.time()}
            process = subprocess.run(
                [sys.executable, str(HERE / 'contestants.py'), function, json.dumps(arguments)],
                capture_output=True, text=True, check=False)
            if process.returncode:
                said = process.stderr.strip().splitlines() or ['no message']
                failures[name] = f'failed with code {process.returncode}: {said[-1]}'
                continue
            result = json.loads(process.stdout.splitlines()[-1])
            if 'skipped' in result:
                failures[name] = f'skipped: {result["skipped"]}'
            else:
                results[name].append(result)

    medians = {name: {figure: statistics.median(result[figure] for result in found)
                      for figure in found[0]} for name, found in results.items() if found}
    compared = []
    for name, figure, other, other_figure, bound in ratios:
        pairs = list(zip(results[name], results[other]))
        if pairs:
            values = [one[figure] / two[other_figure] for one, two in pairs]
            compared.append({'of': f'{name}: {figure}', 'to': f'{other}: {other_figure}',
                             'median': statistics.median(values), 'least': min(values),
                             'most': max(values), 'bound': bound})
    return {'title': title, 'medians': medians, 'failures': failures, 'ratios': compared}


def table(result):
    """A benchmark's results as Markdown."""
    figures = list(dict.fromkeys(figure for found in result['medians'].values()
                                 for figure in found))
    lines = [f'**{result["title"]}**', '', '| | ' + ' | '.join(figures) + ' |',
             '|---|' + '---:|' * len(figures)]
    for name, found in result['medians'].items():
        lines.append(f'| {name} | ' + ' | '.join(
            f'{found[figure]:,.4g}' if figure in found and found[figure] < 1e4
            else f'{found[figure]:,.0f}' if figure in found else '' for figure in figures) + ' |')
    lines += [f'| {name} | {reason} |' + ' |' * (len(figures) - 1)
              for name, reason in result['failures'].items()]
    if result['ratios']:
        lines += ['', '| ratio of | to | median (least to most) | at most |', '|---|---|---:|---:|']
        lines += [f'| {ratio["of"]} | {ratio["to"]} | {ratio["median"]:.2f} '
                  f'({ratio["least"]:.2f} to {ratio["most"]:.2f}) | {ratio["bound"] or ""} |'
                  for ratio in result['ratios']]
    return '\n'.join(lines)


def machine():
    """One line: processor, threads, versions."""
    model = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo') as f:
            model = next((line.split(':')[1].strip() for line in f if 'model name' in line), model)
    versions = [f'{name} {importlib.metadata.version(name)}'
                for name in ('tensorflow', 'keras', 'numpy', 'torch')
                if importlib.util.find_spec(name)]
    return (f'{datetime.date.today()}; {model}, {os.cpu_count()} threads for each contestant; '
            f'Python {platform.python_version()}, {", ".join(versions)}')


def write_synthetic(folder, images):
    """An unpacked data set of so many training images, MNIST's own over and over."""
    mnist = input_data.read_data_sets(HERE.parent / 'MNIST_data', dtype='uint8',
                                      validation_size=0)
    for part, count in (('train', images), ('t10k', 100)):
        for kind, array in (('images-idx3', mnist.train.images.reshape(-1, 28, 28)),
                            ('labels-idx1', mnist.train.labels)):
            with open(os.path.join(folder, f'{part}-{kind}-ubyte'), 'wb') as f:
                f.write(np.array([2048 + array.ndim, count, *array.shape[1:]], '>u4').tobytes())
                f.writelines(array[:count - start].tobytes()
                             for start in range(0, count, len(array)))


def small_data(folder):
    """Writes 6,000 training and 100 test images; the flag that has a script use them."""
    write_synthetic(folder, 6000)
    return [f'--data_dir={folder}']


def loader(quick, note, _):
    """Loading and minibatches."""
    epochs = 1 if quick else 20
    with tempfile.TemporaryDirectory() as folder:
        mnist = input_data.read_data_sets(HERE.parent / 'MNIST_data', dtype='uint8',
                                          reshape=False, validation_size=0)
        npz = os.path.join(folder, 'mnist.npz')
        np.savez_compressed(npz, x_train=mnist.train.images[..., 0], y_train=mnist.train.labels,
                            x_test=mnist.test.images[..., 0], y_test=mnist.test.labels)
        ours, old = 'this project', 'the 1.x way'
        yield compete('Loader, MNIST', {
            ours: (None, 'loader_ours', {'epochs': epochs}),
            old: (None, 'loader_1x', {'epochs': epochs}),
            'Keras load_data': ('keras', 'loader_keras', {'epochs': epochs, 'npz': npz})},
            1 if quick else 5,
            [(ours, 'load s', old, 'load s', 0.4),
             (ours, 'load s', ours, 'gunzip s', None),
             (ours, 'gunzip s', old, 'load s', None),
             (ours, 'memory MB', old, 'memory MB', 0.35),
             (ours, 'batch us', old, 'batch us', 0.7)], note)

    contestants = {}
    with tempfile.TemporaryDirectory() as folder:
        for images in (2500, 10000) if quick else (250_000, 1_000_000, 2_000_000):
            side = os.path.join(folder, str(images))
            os.mkdir(side)
            write_synthetic(side, images + 5000)
            arguments = {'epochs': 1.1, 'folder': side}
            if not quick or images > 5000:
                contestants[f'this project, {images:,}'] = None, 'loader_ours', arguments
                contestants[f'the 1.x way, {images:,}'] = None, 'loader_1x', arguments
        result = compete('Loader, synthetic images', contestants, 1, [], note)
        for found in result['medians'].values():
            found['bytes per pixel'] = found['memory MB'] * 1e6 / (found['images'] + 5000) / 784
        yield result


def step(quick, note, _):
    """A training step."""
    steps = {'steps': 5 if quick else 150}
    ours = 'this project, float32'
    yield compete('Training step of the CNN, batch 50', {
        ours: (None, 'step_ours', steps),
        'Keras fit': ('keras', 'step_keras', steps),
        'PyTorch': ('torch', 'step_torch', steps),
        'PyTorch, channels_last': ('torch', 'step_torch', {**steps, 'channels_last': True}),
        'this project, bfloat16': (None, 'step_ours', {**steps, 'bfloat16': True}),
        'PyTorch, bfloat16': ('torch', 'step_torch', {**steps, 'bfloat16': True})},
        1 if quick else 5,
        [(ours, 'step ms', 'Keras fit', 'step ms', 0.9),
         (ours, 'step ms', 'PyTorch', 'step ms', 0.9),
         (ours, 'step ms', 'PyTorch, channels_last', 'step ms', 0.9),
         (ours, 'step ms', ours, 'limit ms', 1.25),
         ('this project, bfloat16', 'step ms', ours, 'step ms', 0.7)], note)


def evaluation(quick, note, _):
    """The test accuracy."""
    images = {'images': 400 if quick else 10000, 'products': 2 if quick else 20}
    one, other = 'in batches of 200', 'all at once'
    yield compete('Test evaluation', {
        one: (None, 'evaluation', {**images, 'at_once': False}),
        other: (None, 'evaluation', {**images, 'at_once': True})}, 1 if quick else 9,
        [(one, 'evaluation s', other, 'evaluation s', 0.4),
         (one, 'evaluation s', one, 'limit s', None),
         (other, 'limit s', other, 'evaluation s', None),
         (one, 'peak MB', other, 'peak MB', 0.45)], note)


def whole(quick, note, _):
    """mnist_deep.py from start to end."""
    steps = {'steps': 10 if quick else 2000}
    with tempfile.TemporaryDirectory() as folder:
        data, contestants = small_data(folder) if quick else [], {}
        for name, precision in (('float32', []), ('bfloat16', ['--bfloat16'])):
            flags = [*precision, *data]
            kept = [*flags, f'--model_dir={os.path.join(folder, name)}']
            contestants[name] = None, 'whole_run', {**steps, 'flags': flags}
            contestants[f'{name}, --model_dir'] = None, 'whole_run', {**steps, 'flags': kept}
        # One round: the next would find the models finished.
        yield compete('mnist_deep.py', contestants, 1, [
            ('bfloat16', 's per 1,000 steps', 'float32', 's per 1,000 steps', None)], note)


def pictures(quick, note, model_dir):
    """mnist_predict.py, with a fully trained network."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_dir
        if not folder:
            folder = os.path.join(temporary, 'model')
            note('training the network that reads')
            subprocess.run([sys.executable, str(HERE.parent / 'mnist_deep.py'), '--seed=0',
                            f'--max_steps={100 if quick else 20000}', f'--model_dir={folder}'],
                           check=True, stdout=subprocess.DEVNULL)
        digits = {'model_dir': folder, 'digits': 20 if quick else 500}
        yield compete('Pasted digits of 28 to 1,000 pixels', {
            name: (None, 'reading', {**digits, 'way': way}) for name, way in (
                ('normalised', 'normalised'), ('resized to 28x28', 'resized'),
                ("MNIST's digits themselves", 'directly'))}, 1, [], note)
        sizes = {'280x280 drawing': (280, 280, 4 if quick else 200),
                 '12-megapixel photo': (3000, 4000, 1 if quick else 20)}
        yield compete('mnist_predict.py', {
            name: (None, 'predict', {'model_dir': folder, 'height': height, 'width': width,
                                     'pictures': count})
            for name, (height, width, count) in sizes.items()}, 1 if quick else 3, [], note)


def workers(quick, note, _):
    """mnist_replica.py: 2 cores show what the wire costs, not how it scales."""
    alone, one, two = 'mnist_deep.py', '1 ps, 1 worker', '1 ps, 2 workers'
    with tempfile.TemporaryDirectory() as folder:
        data = small_data(folder) if quick else []
        contestants = {
            name: (None, 'training', {'steps': 150 if quick else 1001, 'batch': 5 if quick else 50,
                                      'script': script, 'flags': [*flags, *data]})
            for name, script, flags in ((alone, 'mnist_deep.py', []),
                                        (one, 'mnist_replica.py', ['--workers=1']),
                                        (two, 'mnist_replica.py', ['--workers=2']))}
        yield compete('mnist_replica.py', contestants, 1 if quick else 3, [
            (one, 'step ms', alone, 'step ms', None),
            (two, 'images per s', one, 'images per s', None)], note)


BENCHMARKS = {'loader': loader, 'step': step, 'evaluation': evaluation, 'whole': whole,
              'pictures': pictures, 'workers': workers}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true',
                        help='two minutes: one round on small sizes, to see that all of it runs')
    parser.add_argument('--only', choices=BENCHMARKS, help='one benchmark alone')
    parser.add_argument('--model_dir', metavar='FOLDER', help='a network that mnist_deep.py has '
                        'trained, to read pictures; none: one is trained first')
    parser.add_argument('--json', metavar='FILE', help='also write all figures to a file')
    flags = parser.parse_args()

    def note(line):
        print(line, file=sys.stderr)

    results = []
    print(machine(), end='\n\n')
    for name, benchmark in BENCHMARKS.items():
        if flags.only in (None, name):
            for result in benchmark(flags.quick, note, flags.model_dir):
                results.append(result)
                print(table(result), end='\n\n', flush=True)
    if flags.json:
        with open(flags.json, 'w') as f:
            json.dump({'machine': machine(), 'results': results}, f, indent=1)
    return 1 if any('failed' in reason for result in results
                    for reason in result['failures'].values()) else 0


if __name__ == '__main__':
    sys.exit(main())
