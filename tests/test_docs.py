"""The pages for readers: their Python runs in IPython, their commands, flags and links exist."""

import ast
import importlib.metadata
import itertools
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pexpect
import pytest
import tensorflow.compat.v1 as tf
from conftest import DATA, ENVIRONMENT, FIRST_LINES, ROOT, fork, own_lines
from PIL import Image

import input_data
import mnist_deep
import mnist_softmax
from docs import make_pictures
from extras import draw, pictures, predict, replica

ENGLISH = ['README.md', 'docs/tutorial.md', 'docs/guide.md']
KOREAN = ['README.ko.md', 'docs/tutorial.ko.md', 'docs/guide.ko.md']
PAIRS = list(zip(ENGLISH, KOREAN))
OTHERS = ['CONTRIBUTING.md', 'MNIST_data/README.md', 'benchmarks/README.md']
in_both_languages = pytest.mark.parametrize('pages', [ENGLISH, KOREAN], ids=['English', 'Korean'])


def read(page):
    return (ROOT / page).read_text(encoding='utf-8')


def blocks(page):
    """(language, text) of each block of code."""
    return re.findall(r'^```(\w*)\n(.*?)^```$', read(page), re.MULTILINE | re.DOTALL)


def commands(pages):
    """The blocks that are for a shell."""
    return [text for page in pages for language, text in blocks(page) if language == 'sh']


def sections(page):
    """(title's level, text) of each section, code blocks left out of the search for titles."""
    text = read(page)
    outside = re.sub(r'^```.*?^```$', lambda match: ' ' * len(match[0]), text,
                     flags=re.MULTILINE | re.DOTALL)
    starts = [match.start() for match in re.finditer(r'^#+ ', outside, re.MULTILINE)]
    return [(len(re.match('#+', text[start:])[0]), text[start:end])
            for start, end in zip(starts, [*starts[1:], len(text)])]


def shells(pages):
    """The Python blocks, in order, of each fresh IPython: it begins with TensorFlow or a script."""
    cells = [text for page in pages for language, text in blocks(page) if language == 'python']
    started = []
    for cell in cells:
        if re.match(r'import (os|mnist_\w+|input_data\nimport tensorflow)', cell):
            started.append([])
        started[-1].append(cell)
    return started


def paste(cells, folder):
    """Pastes the cells into a real IPython, one after the other; what each one showed."""
    shell = pexpect.spawn(sys.executable, [
        '-m', 'IPython', '--simple-prompt', '--no-banner', '--colors=NoColor',
        '--InteractiveShell.history_length=0', '--HistoryManager.enabled=False'],
        cwd=str(folder), env={**ENVIRONMENT, 'PYTHONPATH': str(ROOT), 'TERM': 'dumb',
                              'IPYTHONDIR': str(folder / '.ipython')},
        encoding='utf-8', timeout=120, echo=False)
    shell.expect(r'In \[1\]: ')
    shown = []
    for cell in cells:
        # %paste's way into a shell without a clipboard: a cell as it is, then a line that ends it.
        shell.sendline('%cpaste -q')
        shell.send(cell)
        shell.sendline('--')
        shell.expect(r'In \[\d+\]: ')
        shown.append(own_lines(shell.before.replace('\r', '')))
    shell.sendline('exit')
    shell.expect(pexpect.EOF)
    return shown


@pytest.fixture(scope='module')
def folder(tmp_path_factory, trained):
    """A working folder as a reader has it: the data, the pictures, and a trained model."""
    folder = tmp_path_factory.mktemp('reader')
    (folder / 'MNIST_data').symlink_to(DATA)
    (folder / 'docs').symlink_to(ROOT / 'docs')
    (folder / 'model').symlink_to(trained[0])
    return folder


@pytest.fixture(scope='module')
def shown(folder):
    """What IPython shows for each Python block, in each of the shells."""
    return [paste([cell.replace('range(20000)', 'range(101)') for cell in cells], folder)
            for cells in shells(ENGLISH)[:3]]


# Blocks of Python

def test_a_shell_is_started_for_each_part_and_two_more():
    assert [len(cells) for cells in shells(ENGLISH)] == [13, 13, 6, 1]
    # What other people's scripts begin with; tests/test_input_data.py runs it in a real program.
    assert shells(ENGLISH)[3] == [FIRST_LINES]


def test_every_block_runs_in_ipython_with_no_error_or_warning(shown):
    for text in itertools.chain(*shown):
        assert not re.search('error|warning|deprecated|traceback|oneDNN', text, re.IGNORECASE)


def test_blocks_that_promise_no_output_show_none(shown):
    texts = [text.strip() for cells in shown for text in cells]
    texts.pop()  # TensorFlow 2.15's converter to TFLite tells what it did, whatever the log level
    silent = [text for text in texts if not re.search(r'\d', text)]
    assert set(silent) == {''}
    assert len(silent) == 31 - 5


def test_part_one_shows_its_accuracy(shown):
    assert 0.9 < float(shown[0][-1]) < 0.93


def test_part_two_shows_its_training_and_its_accuracy(shown):
    lines = shown[1][-1].split('\n')
    lines = [line for line in lines if line.strip()]
    assert [line.split(',')[0] for line in lines[:-1]] == ['step 0', 'step 100']
    for line in lines[:-1]:
        assert re.fullmatch(r'step \d+, training accuracy [01](\.\d+)?', line)
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', lines[-1])[1]) > 0.75


def test_the_restored_network_reads_both_digits_and_shows_its_features(shown):
    guide = [text.strip() for language, text in blocks('docs/guide.md') if language == 'text']
    answers = [text.strip() for text in shown[2][1:4]]
    assert answers == ['[7]', '[7]', '(1, 28, 28, 32)']
    assert '\n'.join(answers) in '\n'.join(guide)


@pytest.mark.filterwarnings(r'ignore:\s+Warning. tf.lite.Interpreter is deprecated')
def test_the_network_taken_elsewhere_answers_as_it_did_without_dropout(shown, folder):
    mnist = input_data.read_data_sets(str(DATA))
    images = np.vstack([pictures.normalise(ROOT / 'docs' / 'digit.png')[np.newaxis],
                        mnist.test.images[:199]])
    with tf.Graph().as_default(), tf.Session() as sess:
        x = tf.placeholder(tf.float32, shape=[None, 784])
        y_conv, keep_prob = mnist_deep.deepnn(x)
        tf.train.Saver().restore(sess, tf.train.latest_checkpoint(str(folder / 'model')))
        expected = y_conv.eval(feed_dict={x: images, keep_prob: 1.0})
    assert expected.argmax(1)[:2].tolist() == [7, 7]

    signature = re.search(r"`(tf\.saved_model\.load\(.+?\).+?)`", read('docs/guide.md'))[1]
    np.save(folder / 'x.npy', images)
    process = fork('-c', 'import numpy as np, tensorflow as tf\n'
                   'tf.compat.v1.enable_v2_behavior()\n'
                   f'y = {signature}(x=tf.constant(np.load("x.npy")))["y"]\n'
                   'np.save("y.npy", y.numpy())', cwd=folder)
    assert process.wait(60) == 0
    np.testing.assert_allclose(np.load(folder / 'y.npy'), expected, atol=1e-3)

    interpreter = tf.lite.Interpreter(str(folder / 'mnist.tflite'))
    into, = interpreter.get_input_details()
    out, = interpreter.get_output_details()
    interpreter.resize_tensor_input(into['index'], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(into['index'], images)
    interpreter.invoke()
    np.testing.assert_allclose(interpreter.get_tensor(out['index']), expected, atol=1e-3)


# Commands and flags

@in_both_languages
def test_commands_are_good_shell_and_name_files_that_exist(pages):
    assert len(commands(pages)) >= 12
    for command in commands(pages):
        result = subprocess.run(['bash', '-n'], input=command, capture_output=True, text=True,
                                check=False)
        assert result.returncode == 0 and result.stderr == ''
        for name in re.findall(r'(?:-r|python3?|sh) ([\w/]+\.\w+)', command):
            assert (ROOT / name).is_file(), name


def test_quick_commands_run(folder, monkeypatch, capsys):
    assert 'python -m extras.predict docs/digit.png\n' in '\n'.join(commands(['README.md']))
    monkeypatch.chdir(folder)
    predict.main(['docs/digit.png'])
    assert re.fullmatch(r'docs/digit\.png: 7 \(\d+\.\d%\)\n', capsys.readouterr().out)
    assert 'tf_upgrade_v2 --infile old.py --outfile new.py\n' in commands(ENGLISH)
    (folder / 'old.py').write_text('import tensorflow as tf\nx = tf.placeholder(tf.float32)\n')
    monkeypatch.setattr(sys, 'argv', ['tf_upgrade_v2', '--infile', 'old.py', '--outfile', 'new.py'])
    tool, = importlib.metadata.entry_points(group='console_scripts', name='tf_upgrade_v2')
    tool.load()()
    assert 'tf.compat.v1.placeholder' in (folder / 'new.py').read_text()


LOADER, CONTRIB = 'tensorflow.examples.tutorials.mnist', 'tensorflow.contrib'
LEARN = f'{CONTRIB}.learn.python.learn.datasets'
CHANGED = {  # lines of old programs, after the guide's first command, and after its second one
    f'from {LOADER} import input_data': 'import input_data',
    f'\tfrom {LOADER} import input_data as data': '\timport input_data as data',
    f'from {LOADER}.input_data import read_data_sets': 'from input_data import read_data_sets',
    f'import {LOADER}.input_data as input_data': 'import input_data as input_data',
    f'from {LEARN}.mnist import read_data_sets': 'from input_data import read_data_sets',
    f'from {LEARN} import mnist': 'import input_data as mnist',
    'import tensorflow as tf': FIRST_LINES.splitlines()[1],
    'import tensorflow as tf  # 1.4': f'{FIRST_LINES.splitlines()[1]}  # 1.4',
    'import tensorflow as tf2': None,
    'import tensorflow as tf, numpy as np': None,
    'import numpy as np, tensorflow as tf': None,
    'import tensorflow': None,
    'name = "tensorflow as tf"  # \xe9': None,
}
CHANGED_FOR_CONTRIB = {
    FIRST_LINES.splitlines()[1]: f'{FIRST_LINES.splitlines()[1]}; import contrib',
    f'from {CONTRIB} import rnn, layers': 'from contrib import rnn, layers',
    f'from {CONTRIB}.layers import flatten': 'from tf_slim import flatten',
    f'import {CONTRIB}.slim as slim': 'import tf_slim as slim',
    'slim.conv2d(x, 32, [5, 5])': None,
}


@pytest.mark.parametrize('number, changes', [(0, CHANGED), (1, CHANGED_FOR_CONTRIB)])
def test_the_guides_commands_change_a_folder_of_programs(number, changes, tmp_path):
    command = [command for command in commands(['docs/guide.md']) if 'LC_ALL=C find' in command]
    lines = [(old, old if new is None else new) for old, new in changes.items()]
    folder = tmp_path / ('new' if number else 'old')
    (folder / 'one more').mkdir(parents=True)
    for name, end in (('a.py', '\n'), ('one more/windows.py', '\r\n')):
        (folder / name).write_bytes(end.join(old for old, _ in lines).encode('latin-1'))
    (folder / 'a.txt').write_text(lines[0][0])
    cells = [{'cell_type': 'code', 'source': source} for source in (
        [old for old, _ in lines], [f'{old}\n' for old, _ in lines])]
    (folder / 'a book.ipynb').write_text(json.dumps({'cells': cells}, indent=1))
    (tmp_path / 'input_data.py').write_text('# the loader')

    subprocess.run(['bash', '-ec', command[number]], cwd=tmp_path, check=True)
    for name, end in (('a.py', '\n'), ('one more/windows.py', '\r\n')):
        assert (tmp_path / 'new' / name).read_bytes().decode('latin-1').split(end) == [
            new for _, new in lines]
    assert (tmp_path / 'new' / 'a.txt').read_text() == lines[0][0]
    book = json.loads((tmp_path / 'new' / 'a book.ipynb').read_text())
    assert [cell['source'] for cell in book['cells']] == [
        [new for _, new in lines], [f'{new}\n' for _, new in lines]]
    if number == 0:
        assert (folder / 'a.py').read_bytes().decode('latin-1') == '\n'.join(changes)
        assert (tmp_path / 'new' / 'input_data.py').read_text() == '# the loader'


def test_what_the_guides_contrib_py_mends_is_still_in_its_place():
    contrib, = [text for language, text in blocks('docs/guide.md') if language == 'py']
    imports = [node for node in ast.parse(contrib).body if isinstance(node, ast.ImportFrom)]
    assert len(imports) == 3
    for line in imports:
        module = f'{line.module}.{line.names[0].name}'
        assert importlib.import_module(module).__name__ == module


@in_both_languages
def test_every_flag_they_name_exists_and_every_flag_is_named(pages):
    text = '\n'.join(map(read, pages))
    rows = dict(re.findall(r'^\| `(--\w+)` \| ([^|]+) \|', text, re.MULTILINE))
    parsed = {'mnist_softmax.py': mnist_softmax.parse_flags([]),
              'mnist_deep.py': mnist_deep.flag_parser('').parse_args([]),
              'predict': predict.parse_flags(['picture']), 'draw': draw.parse_flags([]),
              'replica': replica.parse_flags([])}
    known = {f'--{flag}' for flags in parsed.values() for flag in vars(flags)} - {'--pictures'}
    assert rows.keys() == known
    for name, flags in parsed.items():
        assert {flag for flag, of in rows.items() if f'`{name}`' in of} == {
            f'--{flag}' for flag in vars(flags)} - {'--pictures'}, name
    named = set(re.findall(r'(?<![\w-])--\w[\w-]*', text))
    assert known <= named <= known | {'--dist', '--logdir', '--infile', '--outfile', '--help',
                                      '--network', '--to', '--output'}


# Pages

def test_the_front_page_is_short_and_names_every_file():
    assert len(read('README.md').splitlines()) <= 150 >= len(read('README.ko.md').splitlines())
    files = [*ROOT.glob('*.py'), *ROOT.glob('extras/[!_]*.py')]
    for page, path in itertools.product(('README.md', 'README.ko.md'), files):
        assert f'`{path.relative_to(ROOT)}`' in read(page)


@pytest.mark.parametrize('page, other', PAIRS)
def test_both_languages_have_the_same_blocks_and_sections(page, other):
    assert blocks(page) == blocks(other)
    assert [level for level, _ in sections(page)] == [level for level, _ in sections(other)]
    for (_, one), (_, two) in zip(sections(page), sections(other)):
        assert one.count('```') == two.count('```')
        assert one.count('\n|') == two.count('\n|')
        assert re.findall(r'!\[.*?\]\((.*?)\)', one, re.DOTALL) == re.findall(
            r'!\[.*?\]\((.*?)\)', two, re.DOTALL)


def test_pages_are_linked_at_the_top_with_the_other_language():
    for page, other in PAIRS + [pair[::-1] for pair in PAIRS]:
        assert f']({pathlib.Path(other).name})' in '\n'.join(read(page).splitlines()[:5])


def anchors(page):
    """What a link can name in a page: its titles, in small letters, without punctuation."""
    titles = [text.splitlines()[0].lstrip('#').strip().lower() for _, text in sections(page)]
    assert len(titles) == len(set(titles))
    return {re.sub(r'[^\w\- ]', '', title).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', ENGLISH + KOREAN + OTHERS)
def test_links_inside_the_repository_resolve(page):
    links = [link for link in re.findall(r'\]\(([^)]+)\)', read(page)) if '://' not in link]
    for link in links:
        name, _, anchor = link.partition('#')
        linked = (ROOT / page).parent / name if name else ROOT / page
        assert linked.is_file(), link
        if anchor:
            assert anchor in anchors(linked.resolve().relative_to(ROOT)), link
        if page in KOREAN:  # a Korean page links to Korean pages, and to its own in English
            name = str(linked.resolve().relative_to(ROOT))
            assert name not in ENGLISH or (name, page) in PAIRS, link


@in_both_languages
def test_the_loaders_table_has_every_public_name(pages):
    loader = importlib.import_module('input_data')
    public = [name for name, value in vars(loader).items() if not name.startswith('_')
              and getattr(value, '__module__', None) == 'input_data'] + ['DEFAULT_SOURCE_URL']
    for name in public:
        assert f'`{name}' in read(pages[2]), name


# Pictures

@pytest.mark.parametrize('pages', [ENGLISH])
def test_every_picture_is_shown(pages):
    for path in [*(ROOT / 'docs').glob('*.png'), *(ROOT / 'docs').glob('*.gif')]:
        shown = [page for page in pages if f']({path.name})' in read(page)
                 or f'](docs/{path.name})' in read(page)]
        assert shown, path.name


def test_pictures_come_from_the_projects_own_code(tmp_path):
    make_pictures.main(tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted({path.name for path in (ROOT / 'docs').glob('*.png')} - {'drawing.png'})
    for name in made:
        committed, anew = (np.asarray(Image.open(folder / name), float)
                           for folder in (ROOT / 'docs', tmp_path))
        assert committed.shape == anew.shape
        # Weights differ in the last bits from machine to machine; digits are the files'.
        exact = name in ('digits.png', 'digit.png')
        assert np.abs(committed - anew).max() <= (0 if exact else 16)


def test_the_pictures_of_the_page_have_the_sizes_that_they_are_made_in():
    for name, size in (('drawing.png', make_pictures.DRAWING_SIZE),
                       ('learning.gif', make_pictures.LEARNING_SIZE)):
        with Image.open(ROOT / 'docs' / name) as screenshot:
            assert screenshot.size == size
            assert getattr(screenshot, 'n_frames', 1) == (
                1 if name == 'drawing.png' else len(make_pictures.LEARNING_STEPS))
    assert (ROOT / 'docs' / 'learning.gif').stat().st_size < 1e6
