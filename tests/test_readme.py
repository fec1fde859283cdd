"""The READMEs: their Python runs in IPython, their commands, flags and links exist."""

import importlib
import pathlib
import re
import subprocess
import sys

import make_pictures
import numpy as np
import pexpect
import pytest
from conftest import DATA, ENVIRONMENT, ROOT, python

import mnist_deep
import mnist_replica
import mnist_softmax

READMES = ['README.md', 'README.ko.md']
both = pytest.mark.parametrize('readme', READMES)


def blocks(readme):
    """(language, text) of each block of code."""
    text = (ROOT / readme).read_text(encoding='utf-8')
    return re.findall(r'^```(\w*)\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def sections(readme):
    """(title's level, text) of each section, code blocks left out of the search for titles."""
    text = (ROOT / readme).read_text(encoding='utf-8')
    outside = re.sub(r'^```.*?^```$', lambda match: ' ' * len(match[0]), text,
                     flags=re.MULTILINE | re.DOTALL)
    starts = [match.start() for match in re.finditer(r'^#+ ', outside, re.MULTILINE)]
    return [(len(re.match('#+', text[start:])[0]), text[start:end])
            for start, end in zip(starts, [*starts[1:], len(text)])]


def shells(readme):
    """The Python blocks, in order, of each fresh IPython: it begins with an import of ours."""
    cells = [text for language, text in blocks(readme) if language == 'python']
    started = []
    for cell in cells:
        if cell.startswith(('import mnist_', 'import input_data\nimport tensorflow')):
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
        shown.append(shell.before.replace('\r', ''))
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
    """What IPython shows for each Python block of the README, in each of its shells."""
    return [paste([cell.replace('range(20000)', 'range(201)') for cell in cells], folder)
            for cells in shells('README.md')]


# The tutorial

def test_the_readme_starts_a_shell_for_each_part_and_two_more():
    assert [len(cells) for cells in shells('README.md')] == [13, 13, 4, 1]


def test_every_block_runs_in_ipython_with_no_error_or_warning(shown):
    for cells in shown[:3]:
        for text in cells:
            assert not re.search('error|warning|deprecated|traceback|oneDNN', text, re.IGNORECASE)
    # The lines for other people's scripts don't keep TensorFlow quiet, but they run.
    assert not re.search('Error:|Traceback', shown[3][0])


def test_blocks_that_promise_no_output_show_none(shown):
    silent = [text.strip() for cells in shown[:3] for text in cells if not re.search(r'\d', text)]
    assert set(silent) == {''}
    assert len(silent) == 30 - 4


def test_part_one_shows_its_accuracy(shown):
    assert 0.9 < float(shown[0][-1]) < 0.93


def test_part_two_shows_its_training_and_its_accuracy(shown):
    lines = shown[1][-1].split('\n')
    lines = [line for line in lines if line.strip()]
    assert [line.split(',')[0] for line in lines[:-1]] == ['step 0', 'step 100', 'step 200']
    for line in lines[:-1]:
        assert re.fullmatch(r'step \d+, training accuracy [01](\.\d+)?', line)
    assert float(re.fullmatch(r'test accuracy (0\.\d+)', lines[-1])[1]) > 0.85


def test_the_restored_network_reads_both_digits(shown):
    assert [text.strip() for text in shown[2][-2:]] == ['[7]', '[7]']


def test_both_readmes_have_the_same_blocks_and_sections():
    assert blocks('README.md') == blocks('README.ko.md')
    assert [level for level, _ in sections('README.md')] == [
        level for level, _ in sections('README.ko.md')]
    for (_, one), (_, other) in zip(sections('README.md'), sections('README.ko.md')):
        assert one.count('```') == other.count('```')
        assert one.count('\n|') == other.count('\n|')


def test_the_readmes_are_linked_both_ways_at_the_top():
    for readme, other in zip(READMES, reversed(READMES)):
        assert f']({other})' in '\n'.join((ROOT / readme).read_text().splitlines()[:5])


# Commands, flags, links

@both
def test_commands_are_good_shell_and_name_files_that_exist(readme):
    commands = [text for language, text in blocks(readme) if language == 'sh']
    assert len(commands) >= 7
    for command in commands:
        result = subprocess.run(['bash', '-n'], input=command, capture_output=True, text=True,
                                check=False)
        assert result.returncode == 0 and result.stderr == ''
        for name in re.findall(r'(?:-r|python3?) ([\w/]+\.\w+)', command):
            assert (ROOT / name).is_file()


def test_quick_commands_run(folder):
    commands = [text.strip() for language, text in blocks('README.md') if language == 'sh']
    assert 'python mnist_softmax.py --seed 0' in commands
    result = python(ROOT / 'mnist_softmax.py', '--seed', '0', cwd=folder)
    assert re.fullmatch(r'test accuracy 0\.9[12]\d*\n', result.stdout)
    assert 'tf_upgrade_v2 --infile old.py --outfile new.py' in commands
    (folder / 'old.py').write_text('import tensorflow as tf\nx = tf.placeholder(tf.float32)\n')
    tool = pathlib.Path(sys.executable).with_name('tf_upgrade_v2')
    subprocess.run([tool, '--infile', 'old.py', '--outfile', 'new.py'], cwd=folder, check=True,
                   capture_output=True)
    assert 'tf.compat.v1.placeholder' in (folder / 'new.py').read_text()


def test_ci_runs_the_readmes_test_command():
    result = subprocess.run(['bash', '.ci/run', '--print'], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    commands = [text for language, text in blocks('README.md') if language == 'sh']
    assert result.returncode == 0
    assert result.stdout in commands and 'pytest' in result.stdout


@both
def test_every_flag_it_names_exists_and_every_flag_is_named(readme):
    text = (ROOT / readme).read_text(encoding='utf-8')
    table = re.findall(r'^\| `(--\w+)` \| (\S+)', text, re.MULTILINE)
    softmax, deep = (set(re.findall(r'--\w+', script.parse_flags([])[0].format_help()))
                     - {'--help'} for script in (mnist_softmax, mnist_deep))
    assert {flag for flag, _ in table} == deep
    assert {flag for flag, of in table if 'mnist_deep' not in of} == softmax
    later = set(re.findall(r'--\w+', python('mnist_predict.py', '--help').stdout
                           + mnist_replica.parse_flags([])[0].format_help())) - {'--help'}
    assert {'--show', '--workers', '--sync_replicas'} <= later <= set(re.findall(r'--\w+', text))
    deep |= later
    other = {'--dist', '--logdir', '--infile', '--outfile', '--help', '--quick', '--only', '--json'}
    assert set(re.findall(r'(?<![\w-])--\w[\w-]*', text)) <= deep | other


@pytest.mark.parametrize('page', [*READMES, 'MNIST_data/README.md'])
def test_links_inside_the_repository_resolve(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    titles = {re.sub(r'[^\w\- ]', '', line.lstrip('#').strip().lower()).replace(' ', '-')
              for line in text.splitlines() if line.startswith('#')}
    links = [link for link in re.findall(r'\]\(([^)]+)\)', text) if '://' not in link]
    for link in links:
        if link.startswith('#'):
            assert link[1:] in titles
        else:
            assert ((ROOT / page).parent / link).exists()
    assert links or page.startswith('MNIST_data')


def test_the_loaders_table_has_every_public_name():
    loader = importlib.import_module('input_data')
    public = [name for name, value in vars(loader).items() if not name.startswith('_')
              and getattr(value, '__module__', None) == 'input_data'] + ['DEFAULT_SOURCE_URL']
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding='utf-8')
        for name in public:
            assert f'`{name}' in text, name


# Pictures

def test_pictures_come_from_the_projects_own_code(tmp_path):
    tf = mnist_softmax.tf
    make_pictures.main(tmp_path)
    with tf.Graph().as_default(), tf.Session() as sess:
        for path in sorted((ROOT / 'docs').iterdir()):
            committed, made = (sess.run(tf.image.decode_png(png.read_bytes())).astype(float)
                               for png in (path, tmp_path / path.name))
            assert committed.shape == made.shape
            # Weights differ in the last bits from machine to machine; digits are the files'.
            exact = path.name in ('digits.png', 'digit.png')
            assert np.abs(committed - made).max() <= (0 if exact else 16)


def test_every_picture_is_shown():
    text = (ROOT / 'README.md').read_text()
    for path in (ROOT / 'docs').iterdir():
        assert f'](docs/{path.name})' in text
