"""Part five of the tutorial: the server of the page, and the page in real browsers."""

import base64
import concurrent.futures
import contextlib
import functools
import http.client
import io
import json
import re
import shutil
import signal
import socket
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from browser import (
    CHROMIUM,
    DRIVER,
    FIREFOX,
    Firefox,
    draw,
    perform,
    start_chromium,
)
from conftest import DATA, ENVIRONMENT, ROOT, fork, own_lines, start
from PIL import Image, ImageDraw

import input_data
import mnist_deep
import model_dir
from extras import draw as drawing_page
from extras import pictures

TEST = input_data.read_data_sets(DATA).test
FIRST = [int(np.flatnonzero(TEST.labels == digit)[0]) for digit in range(10)]


def png(image):
    """One of MNIST's images as a drawing in a PNG file: dark on light, ten times enlarged."""
    pixels = Image.fromarray(255 - np.round(image.reshape(28, 28) * 255).astype(np.uint8))
    file = io.BytesIO()
    pixels.resize((280, 280), Image.BICUBIC).save(file, 'PNG')
    return file.getvalue()


def serve(folder):
    """Starts extras.draw with a model folder; its attribute `address` is the page's."""
    running = fork('-m', 'extras.draw', '--model_dir', folder, '--port', 0, '--no_browser')
    running.address = running.stdout.readline().strip()
    return running


@pytest.fixture(scope='module')
def finished(trained, tmp_path_factory):
    """A folder whose checkpoint, of 120 steps, has the name of one of 20,000."""
    folder = tmp_path_factory.mktemp('finished')
    for path in trained[0].glob('mnist_deep.ckpt-120.*'):
        shutil.copy(path, folder / path.name.replace('-120.', '-20000.'))
    return folder


@pytest.fixture(scope='module')
def process(finished):
    """extras.draw with a network that counts as trained."""
    running = serve(finished)
    yield running
    running.kill()
    running.communicate()


@pytest.fixture
def learner(tmp_path):
    """extras.draw without a trained network."""
    running = serve(tmp_path / 'none')
    running.folder = tmp_path / 'none'
    yield running
    running.kill()
    running.communicate()


@pytest.fixture
def ask(process):
    """Sends a request; the status, the headers and the body of the answer."""
    return functools.partial(request, process)


def request(process, method, path, body=None, **headers):
    connection = http.client.HTTPConnection('127.0.0.1', port(process), timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, response.headers, response.read()


def state(process):
    """How far the process's training is."""
    return json.loads(request(process, 'GET', '/state')[2])


def port(process):
    return int(re.fullmatch(r'http://127\.0\.0\.1:(\d+)/', process.address)[1])


# The networks

def test_a_drawing_is_read_by_both_networks_and_the_layers_are_told(ask):
    drawing = png(TEST.images[FIRST[7]])
    status, _, body = ask('POST', '/read', drawing)
    answer = json.loads(body)
    assert status == 200 and 'message' not in answer
    for model in ('deep', 'softmax'):
        assert np.argmax(answer[model]) == 7
        assert sum(answer[model]) == pytest.approx(1, abs=1e-4)
    seen = pictures.normalise(pictures.open_picture(io.BytesIO(drawing))).reshape(28, 28)
    assert (np.array(answer['image']) == np.round(seen * 255)).all()
    layers = {name: np.array(features) for name, features in answer['layers'].items()}
    assert {name: features.shape for name, features in layers.items()} == {
        'conv1/Relu:0': (32, 28, 28), 'pool1/MaxPool:0': (32, 14, 14),
        'conv2/Relu:0': (64, 14, 14), 'pool2/MaxPool:0': (64, 7, 7)}
    conv1, pool1, conv2, pool2 = layers.values()
    for layer, pooled in ((conv1, pool1), (conv2, pool2)):
        assert set(layer.max((1, 2))) <= {0, 255}  # each feature is on a scale of its own
        blocks = layer.reshape(len(layer), pooled.shape[1], 2, pooled.shape[2], 2)
        assert (blocks.max((2, 4)) == pooled).all()
    filters = np.array(answer['state']['filters'])
    assert filters.shape == (32, 5, 5) and (np.abs(filters).max((1, 2)) == 255).all()


def test_the_evidence_of_softmax_regression_is_where_the_ink_is(ask):
    answer = json.loads(ask('POST', '/read', png(TEST.images[FIRST[7]]))[2])
    evidence, ink = np.array(answer['evidence']), np.array(answer['image']) > 0
    assert evidence.shape == (10, 28, 28)
    assert np.abs(evidence[:, ~ink]).max() <= 1  # what is rounded to 0 in one may be 1 in the other
    assert np.mean(evidence[:, ink] != 0) > 0.9 and evidence.min() < 0 < evidence.max()
    exponentials = np.exp(answer['sums'])
    assert answer['softmax'] == pytest.approx(exponentials / exponentials.sum(), abs=1e-4)


def test_a_scribble_is_answered_with_a_doubt_a_dot_not_at_all_and_digits_without(ask):
    scribble, dot = (Image.new('L', (280, 280), 255) for _ in range(2))
    ImageDraw.Draw(scribble).line(
        [(50 + 15 * i, 60 if i % 2 else 220) for i in range(13)], 0, 20, joint='curve')
    ImageDraw.Draw(dot).ellipse((130, 130, 150, 150), 0)
    answers = []
    for picture in (scribble, dot):
        file = io.BytesIO()
        picture.save(file, 'PNG')
        status, _, body = ask('POST', '/read', file.getvalue())
        assert status == 200
        answers.append(json.loads(body))
    assert len(answers[0]['deep']) == 10
    assert answers[0]['message'].startswith('this may not be a digit')
    assert 'deep' not in answers[1] and answers[1]['message'].startswith('no digit')
    marked = sum(map(drawing_page.is_unlike_mnist, TEST.images))
    assert marked <= 0.001 * TEST.num_examples


def test_what_may_be_two_digits_is_answered_with_that_remark(ask):
    both = np.concatenate([TEST.images[FIRST[digit]].reshape(28, 28) for digit in (4, 2)], axis=1)
    file = io.BytesIO()
    Image.fromarray(np.uint8(255 - 255 * both)).resize((560, 280), Image.BICUBIC).save(file, 'PNG')
    status, _, body = ask('POST', '/read', file.getvalue())
    answer = json.loads(body)
    assert status == 200 and 'digits' in answer['message']
    assert len(answer['deep']) == 10 and np.any(answer['image'])


def test_twenty_clients_at_once_get_the_answers_that_one_gets(ask):
    drawings = [png(TEST.images[number]) for number in FIRST] * 2
    alone = [ask('POST', '/read', drawing)[2] for drawing in drawings]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda drawing: ask('POST', '/read', drawing)[2], drawings))
    for one, other in zip(map(json.loads, alone), map(json.loads, together)):
        assert one['image'] == other['image'] and one['layers'] == other['layers']
        assert one['deep'] == pytest.approx(other['deep'], abs=1e-4)
    digits = [np.argmax(json.loads(body)['deep']) for body in alone]
    assert np.mean(np.equal(digits, [*range(10)] * 2)) >= 0.8


# Learning

def test_without_a_trained_network_one_learns_while_it_answers(learner):
    drawing, steps, shares = png(TEST.images[FIRST[7]]), [], []
    while not steps or steps[-1] < 60:
        assert learner.poll() is None
        time.sleep(0.5)  # as the page does
        answer = json.loads(request(learner, 'POST', '/read', drawing)[2])
        steps.append(answer['state']['step'])
        shares.append(answer['deep'][7])
    now = state(learner)
    assert now['training'] and not now['finished'] and not now['trained']
    assert (now['start'], now['kept'], now['fault']) == (0, str(learner.folder), None)
    assert steps == sorted(steps) and now['steps'] == 20000
    assert len(now['accuracies']) in (now['step'] // 50, 1 + now['step'] // 50)
    begin, end = now['accuracies'][0], now['accuracies'][-1]
    assert begin[0] < 0.5 < end[0] and 0.8 < end[1]
    assert len(set(shares)) > 1
    assert len(json.dumps(now)) < 5000

    for path in ('/learn', '/back'):  # there is nothing to begin, nor to go back to
        assert json.loads(request(learner, 'POST', path)[2])['step'] >= now['step']


def test_its_page_shows_that_and_what_is_kept_goes_on_elsewhere(chromium, learner, few_digits,
                                                                tmp_path):
    chromium.get(learner.address)
    until(lambda: text(chromium, 'training').startswith('step '))
    for name in ('learn', 'back'):
        assert not chromium.find_element('id', name).is_displayed()
    assert f'is kept in the folder {learner.folder}.' in text(chromium, 'note')
    learner.terminate()
    until(lambda: 'is extras.draw still running' in text(chromium, 'message'))
    assert text(chromium, 'training') == ''
    chromium.get_log('browser')  # it says that the server is gone
    output, errors = learner.communicate(timeout=60)
    assert (learner.returncode, output) == (143, '')
    said = own_lines(errors).splitlines()
    assert said[0] == 'starting TensorFlow ...'
    assert said[-2].endswith(f'the convolutional one is kept in {learner.folder}')
    steps = int(re.fullmatch(rf'stopped at step (\d+), kept in {learner.folder}', said[-1])[1])

    def run(*arguments):
        process = fork(*arguments, '--model_dir', learner.folder)
        output, errors = process.communicate()
        assert process.returncode == 0
        return output, own_lines(errors)
    _, errors = run('mnist_deep.py', f'--max_steps={steps + 1}', '--data_dir', few_digits)
    assert errors == f'going on from step {steps} of {steps + 1}\n'
    (tmp_path / '7.png').write_bytes(png(TEST.images[FIRST[7]]))
    output, _ = run('-m', 'extras.predict', tmp_path / '7.png')
    assert re.match(rf'{tmp_path}/7\.png: \d \(', output)  # right or not, after so few steps
    again = serve(learner.folder)
    assert state(again)['start'] == steps + 1
    again.send_signal(signal.SIGHUP)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 129
    assert f'going on from step {steps + 1} of 20000' in errors
    last, = re.findall(rf'stopped at step (\d+), kept in {learner.folder}\n$', errors)
    assert (learner.folder / f'mnist_deep.ckpt-{last}.index').exists()


@pytest.fixture
def new_networks():
    """Makes `Networks` that have learned nothing."""
    mnist = input_data.read_data_sets(DATA, one_hot=True, seed=1)
    return functools.partial(drawing_page.Networks, mnist, seed=1)


def training_flags(folder, save_checkpoints_steps):
    return mnist_deep.flag_parser('').parse_args([
        f'--model_dir={folder}', f'--save_checkpoints_steps={save_checkpoints_steps}'])


def test_where_another_training_uses_the_folder_it_says_that_nothing_is_kept(
        new_networks, trained, tmp_path, capsys):
    for path in trained[0].glob('mnist_deep.ckpt-120.*'):
        shutil.copy(path, tmp_path)
    before = sorted(tmp_path.iterdir())
    with model_dir.claim(str(tmp_path)):
        networks = new_networks()
        networks.keep(training_flags(tmp_path, 1))
        networks.thread.start()
        until(lambda: networks.step > 122)  # it goes on from what is there
        now = networks.state()
        networks.stop(KeyboardInterrupt())
    assert now['kept'] is None and 'another training uses it' in now['fault']
    assert 'another training uses it' in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / '.lock', *before]


def test_a_full_disk_is_told_and_the_training_goes_on_and_is_saved_later(
        new_networks, disk, capsys):
    networks = new_networks()
    networks.keep(training_flags(disk.folder, 5))
    disk.fill()
    networks.thread.start()
    until(lambda: networks.step > 6)
    now = networks.state()
    assert now['training'] and now['kept'] == str(disk.folder)
    assert re.match(f'--model_dir {disk.folder}: the checkpoint of step 5 cannot be saved '
                    f'.{disk.reason}.; there is no earlier one', now['fault'])
    assert f"{now['fault']}\n" in capsys.readouterr().err
    disk.empty()
    until(lambda: networks.kept.checkpoints.last_step and not networks.fault)
    stopped = model_dir.Stopped(signal.SIGTERM)
    networks.stop(stopped)
    assert str(stopped) == (
        f'stopped at step {networks.kept.checkpoints.last_step}, kept in {disk.folder}')
    assert networks.kept.checkpoints.last_step in (networks.step, networks.step + 1)


def test_if_the_last_step_cannot_be_saved_that_is_how_it_ends(new_networks, disk, capsys):
    networks = new_networks()
    networks.keep(training_flags(disk.folder, 1000))
    networks.thread.start()
    until(lambda: networks.step > 1)
    disk.fill()
    with pytest.raises(OSError, match='cannot be saved') as unsaved:
        networks.stop(model_dir.Stopped(signal.SIGINT))
    assert capsys.readouterr().err == f'{unsaved.value}\n'


def test_a_seed_repeats_a_training_whatever_is_asked_meanwhile(new_networks):
    weights = []
    for image in (None, TEST.images[0]):
        networks = new_networks()
        for networks.step in range(1, 10):
            networks.train_once()
            if image is not None:
                networks.look(image)
        weights.append(networks.sess.run(drawing_page.FILTERS))
    assert (weights[0] == weights[1]).all()


def test_all_pages_share_a_training_from_scratch_and_the_way_back(process, ask):
    drawing = png(TEST.images[FIRST[2]])
    before = json.loads(ask('POST', '/read', drawing)[2])
    assert before['state']['finished'] and not before['state']['training']
    began = json.loads(ask('POST', '/learn')[2])
    assert began['training'] and began['trained'] and not began['finished']
    until(lambda: state(process)['step'] > 5)
    assert json.loads(ask('POST', '/learn')[2])['step'] > 5  # another page's click: the same one
    assert json.loads(ask('POST', '/read', drawing)[2])['deep'] != before['deep']
    assert json.loads(ask('POST', '/back')[2])['finished']
    assert json.loads(ask('POST', '/read', drawing)[2]) == before


def test_the_training_ends_by_itself(monkeypatch, new_networks):
    monkeypatch.setattr(drawing_page, 'STEPS', 60)
    networks = new_networks()
    networks.thread.start()
    networks.thread.join()
    now = networks.state()
    assert now['step'] == now['steps'] == 60 and not now['training']
    assert len(now['accuracies']) == 3  # before the first step and the 51st, and at the end


# The server

def test_it_serves_the_pages_files_and_no_others(ask):
    for path, name, kind in (('/', 'draw.html', 'text/html'), ('/draw.css', 'draw.css', 'text/css'),
                             ('/draw.js', 'draw.js', 'text/javascript')):
        status, headers, body = ask('GET', path)
        assert (status, body) == (200, (ROOT / 'extras' / name).read_bytes())
        assert headers['Content-Type'] == f'{kind}; charset=utf-8'
        policy = headers['Content-Security-Policy']
        assert "default-src 'none'" in policy and 'unsafe' not in policy and '*' not in policy
        assert headers['X-Content-Type-Options'] == 'nosniff'
    _, _, layers = ask('GET', '/layers.js')
    assert layers.startswith(b'const LAYERS = {"conv1/Variable:0": [32, 5, ')
    assert ask('GET', '/?token=x')[2] == (ROOT / 'extras' / 'draw.html').read_bytes()
    for path in ('/draw.html', '/draw.py', '/extras/draw.py', '/read', '/../input_data.py', '/x?/'):
        assert ask('GET', path)[0] == 404, path


def test_the_page_takes_nothing_from_elsewhere():
    for name in ('draw.html', 'draw.css', 'draw.js'):
        page = (ROOT / 'extras' / name).read_text()
        assert not re.search(r'(src|href|url|import|fetch)\W{1,3}(https?:)?//', page)


@pytest.mark.parametrize('host, origin, status', [
    ('127.0.0.1:PORT', None, 200), ('localhost:PORT', None, 200), ('[::1]:PORT', None, 200),
    ('127.0.0.1:PORT', 'http://127.0.0.1:PORT', 200),
    ('localhost:PORT', 'http://localhost:PORT', 200),
    ('127.0.0.1', None, 403), ('127.0.0.1:1', None, 403), ('example.org:PORT', None, 403),
    ('127.0.0.1:PORT', 'http://example.org', 403), ('127.0.0.1:PORT', 'null', 403),
    ('127.0.0.1:PORT', 'https://127.0.0.1:PORT', 403)])
@pytest.mark.parametrize('method, path', [('GET', '/'), ('GET', '/state'), ('POST', '/read'),
                                          ('POST', '/back')])
def test_only_its_own_page_may_ask(method, path, host, origin, status, process, ask):
    headers = {'Host': host.replace('PORT', str(port(process)))}
    if origin:
        headers['Origin'] = origin.replace('PORT', str(port(process)))
    body = png(TEST.images[0]) if path == '/read' else None
    found, _, answer = ask(method, path, body, **headers)
    assert found == status
    if status == 403:  # as behind a forwarded port of another number
        said = answer.decode()
        assert f'Open {process.address} instead' in said and 'ssh -L' in said


@pytest.mark.parametrize('host, origin, status', [
    ('hub.example.org', None, 200), ('hub.example.org', 'https://hub.example.org', 200),
    ('hub.example.org', 'http://hub.example.org', 200),
    ('127.0.0.1:PORT', 'https://hub.example.org', 200),  # of a proxy that changes the host alone
    ('127.0.0.1:PORT', 'http://127.0.0.1:PORT', 200), ('[::1]:8443', 'https://[::1]:8443', 403),
    ('other.example.org:8443', 'https://other.example.org:8443', 200),
    ('other.example.org', None, 403), ('other.example.org:8443', 'https://example.org', 403),
    ('example.org', None, 403), ('hub.example.org.example.net', None, 403),
    ('hub.example.org', 'https://hub.example.org.example.net', 403),
    ('hub.example.org', 'null', 403), ('hub.example.org', 'ftp://hub.example.org', 403),
    ('hub.example.org', 'https://127.0.0.1:PORT', 403),
    ('hub.example.org', 'http://127.0.0.1:PORT', 403)])
def test_a_proxy_may_have_a_name_that_is_allowed_and_no_other(host, origin, status):
    flags = drawing_page.parse_flags(['--allow_host=Hub.example.org',
                                      '--allow_host=other.example.org:8443'])
    with drawing_page.Server(0, flags.allow_host) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f'http://127.0.0.1:{server.server_port}/'
        headers = {'Host': host, **({'Origin': origin} if origin else {})}
        headers = {name: value.replace('PORT', str(port(server)))
                   for name, value in headers.items()}
        found, _, body = request(server, 'GET', '/', **headers)
        server.shutdown()
    assert found == status
    assert (b'--allow_host' in body) == (status == 403)


def test_a_host_that_is_no_name_is_refused(capsys):
    for name in ('https://hub.example.org', 'hub.example.org/user', '', '*'):
        with pytest.raises(SystemExit):
            drawing_page.parse_flags([f'--allow_host={name}'])
        assert 'expected a name from the address bar' in capsys.readouterr().err


def test_at_port_80_clients_leave_the_port_out():
    assert {'127.0.0.1', 'localhost:80'} <= set(drawing_page.own_hosts(80))
    assert '127.0.0.1' not in drawing_page.own_hosts(8000)


def test_it_listens_on_this_machine_alone(process):
    listening = [connection.laddr.ip for connection in psutil.Process(process.pid).net_connections()
                 if connection.status == psutil.CONN_LISTEN]
    assert listening == ['127.0.0.1']


def test_what_is_no_question_gets_a_status_and_the_server_goes_on(ask, process):
    assert ask('POST', '/', b'x')[0] == 404
    assert ask('PUT', '/read', b'x')[0] == ask('DELETE', '/')[0] == 501
    assert ask('POST', '/read', iter([b'x']))[0] == 411  # in chunks, without a length
    assert ask('POST', '/read', b'x', **{'Content-Length': '-1'})[0] == 411
    status, _, body = ask('POST', '/read', bytes(20_000_001))
    assert status == 413 and b'make the picture smaller' in body
    assert ask('POST', '/read', b'x', **{'Content-Length': '9' * 5000})[0] == 413
    for broken in (b'', b'no picture', png(TEST.images[0])[:200]):
        status, _, body = ask('POST', '/read', broken)
        assert status == 422 and 'deep' not in json.loads(body), broken[:20]
    empty = io.BytesIO()
    Image.new('L', (280, 280), 255).save(empty, 'PNG')
    status, _, body = ask('POST', '/read', empty.getvalue())
    assert status == 200 and 'no digit' in json.loads(body)['message']
    assert 'deep' not in json.loads(body)
    with socket.create_connection(('127.0.0.1', port(process))) as gone:
        gone.sendall(b'POST /read HTTP/1.1\r\nContent-Le')
    with socket.create_connection(('127.0.0.1', port(process))) as nonsense:
        nonsense.sendall(b'\x16\x03\x01\x00\r\n\r\n')
        assert b'400' in nonsense.recv(1000)
    assert ask('GET', '/')[0] == 200


def test_one_picture_at_a_time_is_unpacked(monkeypatch):
    unpacking, most = [], []

    def open_picture(file):
        unpacking.append(file)
        most.append(len(unpacking))
        time.sleep(0.05)
        unpacking.remove(file)
        raise ValueError('no picture')
    monkeypatch.setattr(drawing_page, 'open_picture', open_picture)
    with drawing_page.Server(0) as server:
        server.shown = type('', (), {'state': dict})
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f'http://127.0.0.1:{server.server_port}/'
        with concurrent.futures.ThreadPoolExecutor(5) as pool:
            answers = pool.map(lambda _: request(server, 'POST', '/read', b'x'), range(5))
        assert [status for status, _, _ in answers] == [422] * 5
        server.shutdown()
    assert most == [1] * 5


def test_a_client_that_stops_in_the_middle_is_told_and_let_go(monkeypatch):
    assert drawing_page.Handler.timeout == 10
    monkeypatch.setattr(drawing_page.Handler, 'timeout', 0.5)
    with drawing_page.Server(0) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with socket.create_connection(server.server_address) as client:
            host = f'127.0.0.1:{server.server_port}'
            client.sendall(f'POST /read HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\nhalf'
                           .encode())
            assert b' 408 ' in client.recv(1000)
        with socket.create_connection(server.server_address) as client:
            client.sendall(b'POST /re')
            client.settimeout(30)
            assert client.recv(1000) == b''
        server.shutdown()


def test_a_port_that_is_taken_and_a_damaged_network_are_one_line(
        process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['draw.py'])  # the line begins with it
    (tmp_path / 'mnist_deep.ckpt-7.index').write_bytes(b'no checkpoint')
    for flags, message in ((['--port', str(port(process))],
                            f'--port {port(process)}: Address already in use; name'),
                           (['--port=0', '--model_dir', str(tmp_path)], str(tmp_path)),
                           (['--port=0', '--model_dir='], 'the name is empty')):
        assert mnist_deep.run(functools.partial(drawing_page.main, ['--no_browser', *flags])) == 2
        output, errors = capsys.readouterr()
        line = errors.splitlines()[-1]
        assert line.startswith('draw.py: error: --') and message in line and output == ''


@pytest.mark.parametrize('number', [-1, 65536])
def test_a_port_out_of_range_is_refused(number):
    with pytest.raises(OSError, match=f'--port {number}: .*must be 0-65535.*; name another'):
        drawing_page.main([f'--port={number}'])


def test_it_opens_the_browser_and_ctrl_c_ends_it_with_one_line(finished, tmp_path):
    browser = tmp_path / 'browser'
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened.part\n'
                       f'mv {tmp_path}/opened.part {tmp_path}/opened\n')
    browser.chmod(0o755)
    process = fork('-m', 'extras.draw', '--model_dir', finished, '--port=0',
                   env={**ENVIRONMENT, 'BROWSER': str(browser)})
    address = process.stdout.readline()
    while not (tmp_path / 'opened').exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert (tmp_path / 'opened').read_text() == address
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, '')
    assert own_lines(errors).splitlines()[-1] == 'stopped'


def test_ctrl_c_ends_it_while_tensorflow_starts():
    process = start('-m', 'extras.draw', '--no_browser', '--port=0')
    assert process.stderr.readline() == 'starting TensorFlow ...\n'
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, own_lines(errors)) == (130, '', 'stopped\n')


def test_without_a_display_no_browser_is_opened(monkeypatch):
    monkeypatch.setattr(sys, 'platform', 'linux')
    for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'):
        monkeypatch.delenv(name, raising=False)
    assert not drawing_page.has_display()
    for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'):
        with monkeypatch.context() as patch:
            patch.setenv(name, ':0')
            assert drawing_page.has_display()


# The page

@pytest.fixture(scope='module')
def chromium(process, tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip('needs a browser: apt-get install chromium chromium-driver')
    running = start_chromium(tmp_path_factory.mktemp('profile'))
    yield running
    running.quit()


@pytest.fixture
def page(chromium, process):
    """The page, freshly loaded; what it does must leave no message in the browser's console."""
    chromium.get(process.address)
    yield chromium
    assert chromium.get_log('browser') == []


def text(page, name):
    return page.execute_script(f'return document.getElementById("{name}").textContent')


def until(condition, value=True):
    """Waits for something on the page."""
    end = time.monotonic() + 60
    while condition() != value:
        assert time.monotonic() < end, condition()
        time.sleep(0.01)


def wait_for_answer(page):
    until(lambda: page.execute_script(
        'return document.getElementById("answers").getAttribute("aria-busy")'), 'false')


def painted(page, tiles):
    """(name, whether something is to be seen) of each canvas that a CSS selector finds."""
    return page.execute_script(
        'return [...document.querySelectorAll(arguments[0])].map(canvas => [canvas.ariaLabel,'
        ' canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some('
        '(value, i) => i % 4 === 3 && value > 0)])', tiles)


@pytest.fixture
def browsers(chromium, tmp_path):
    """Starts a browser by its name."""
    with contextlib.ExitStack() as running:
        def start(name):
            if name == 'chromium':
                return chromium
            firefox = Firefox(tmp_path, {'privacy.resistFingerprinting': name == 'strict firefox'})
            running.callback(firefox.quit)
            return firefox
        yield start


# Chromium has to be there; Firefox draws where it is found (Debian: firefox-esr).
OTHERS = ['firefox'] * bool(FIREFOX)


@pytest.mark.parametrize('name', ['chromium', *OTHERS])
def test_drawn_digits_are_read_and_cleared(name, browsers, process):
    browser, right = browsers(name), 0
    browser.get(process.address)
    for digit in (1, 4, 7):
        assert text(browser, 'answer') == ''
        draw(browser, TEST.images[FIRST[digit]])
        wait_for_answer(browser)
        right += text(browser, 'answer') == str(digit)
        browser.execute_script('document.getElementById("clear").click()')
    assert right >= 2  # of 3, by a network that has trained for 120 steps


@pytest.mark.parametrize('lacking', ['delete PointerEvent.prototype.getCoalescedEvents',
                                     'PointerEvent.prototype.getCoalescedEvents = () => []'])
def test_what_a_browser_lacks_does_not_stop_the_drawing(lacking, page):
    draw(page, TEST.images[FIRST[2]])
    drawn = inked(page)
    page.find_element('tag name', 'body').send_keys('\ue00c')  # Escape
    assert not inked(page).any()
    page.execute_script(lacking)
    draw(page, TEST.images[FIRST[2]])
    assert drawn.any() and (inked(page) == drawn).all()


def inked(page):
    """Where there is ink on the paper: bool array [560, 560]."""
    pixels = page.execute_script(
        'return Array.from(pen.getImageData(0, 0, 560, 560).data.filter((_, i) => i % 4 === 0), '
        'level => +(level < 128)).join("")')
    return np.frombuffer(pixels.encode(), np.uint8).reshape(560, 560) == ord('1')


@pytest.mark.parametrize('kind', ['pen', 'touch'])
def test_one_pointer_draws_while_a_palm_trembles(kind, page):
    draw(page, TEST.images[FIRST[1]], kind)
    alone = inked(page)
    page.find_element('id', 'clear').click()
    draw(page, TEST.images[FIRST[1]], kind, palm=True)
    assert alone.any() and (inked(page) == alone).all()
    wait_for_answer(page)
    assert text(page, 'answer') == '1'


def test_undo_takes_back_the_last_stroke(page):
    undo, body = page.find_element('id', 'undo'), page.find_element('tag name', 'body')
    assert not undo.is_enabled()
    sheets = []
    for row in (100, 200, 300):
        sheets.append(inked(page))
        perform(page, 'mouse', [[(row, 100), (row, 200)]])
    wait_for_answer(page)
    for before in reversed(sheets):
        assert (inked(page) != before).any()
        if before.any():
            undo.click()
        else:
            body.send_keys('\ue009z')  # Ctrl-Z
        assert (inked(page) == before).all()
    wait_for_answer(page)
    assert text(page, 'answer') == '' and not undo.is_enabled()
    assert page.find_element('id', 'hint').is_displayed()


@pytest.mark.parametrize('name', ['chromium', *['strict firefox'] * bool(FIREFOX)])
def test_a_browser_that_falsifies_its_canvas_is_told_of(name, browsers, process):
    browser = browsers(name)
    browser.get(process.address)
    if name == 'chromium':  # which has no such setting
        browser.execute_script("""
            const usual = CanvasRenderingContext2D.prototype.getImageData;
            CanvasRenderingContext2D.prototype.getImageData = function (...box) {
              const image = usual.apply(this, box);
              crypto.getRandomValues(image.data);
              return image;
            };""")
    draw(browser, TEST.images[FIRST[7]])
    until(lambda: 'gives the page noise' in text(browser, 'message'))
    assert text(browser, 'answer') == ''
    give(browser, png(TEST.images[FIRST[7]]))
    until(lambda: text(browser, 'answer'), '7')
    browser.get('about:blank')


def test_in_forced_colours_what_means_something_by_its_colour_keeps_it(page):
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {
        'features': [{'name': 'forced-colors', 'value': 'active'}]})
    draw(page, TEST.images[FIRST[0]])
    wait_for_answer(page)
    speaks_for, against, bar, behind = page.execute_script(
        'return [[".for", "color"], [".against", "color"], [".winner .bar i", "backgroundColor"],'
        ' [".winner .bar", "backgroundColor"]].map(([selector, property]) =>'
        ' getComputedStyle(document.querySelector(selector))[property])')
    page.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})
    assert speaks_for != against and bar != behind


def test_what_is_no_single_picture_file_is_said_and_the_drawing_stays(page, tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'one.png').write_bytes(png(TEST.images[0]))
    (tmp_path / 'two.png').write_bytes(png(TEST.images[1]))
    draw(page, TEST.images[FIRST[1]])
    wait_for_answer(page)
    answer, drawn = text(page, 'answer'), inked(page)

    def drop(files, items=()):
        for kind in ('dragEnter', 'dragOver', 'drop'):
            page.execute_cdp_cmd('Input.dispatchDragEvent', {
                'type': kind, 'x': 100, 'y': 200, 'data': {
                    'items': items, 'files': [str(file) for file in files],
                    'dragOperationsMask': 1}})
    for files, items, message in (
            ([tmp_path / 'folder'], [], 'folder cannot be read: is it a folder?'),
            ([tmp_path / 'one.png', tmp_path / 'two.png'], [], '2 files at once'),
            ([], [{'mimeType': 'text/plain', 'data': 'seven'}], 'there is no picture file in it')):
        drop(files, items)
        until(lambda message=message: message in text(page, 'message'))
        assert text(page, 'answer') == answer and (inked(page) == drawn).all()
    drop([tmp_path / 'one.png'])
    until(lambda: text(page, 'answer'), '7')


def test_a_stroke_that_comes_while_the_paper_is_packed_is_asked_about_next(page):
    asked = page.execute_async_script("""
        const [done] = arguments, pack = paper.toBlob.bind(paper), usual = fetch;
        let asked = 0;
        paper.toBlob = then => setTimeout(() => pack(then), 100);
        fetch = (...question) => { asked += question[0] === 'read'; return usual(...question); };
        ask(paper);
        setTimeout(() => ask(paper), 20);
        setTimeout(function wait() {
          if (asking) setTimeout(wait, 10);
          else done(asked);
        }, 50);""")
    assert asked == 2


def test_both_answers_their_bars_and_what_is_found_are_shown(page):
    draw(page, TEST.images[FIRST[0]])
    wait_for_answer(page)
    answers = {'deep': text(page, 'answer'), 'softmax': text(page, 'answer-softmax')}
    for model, answer in answers.items():
        shares = [float(cell.rstrip('%')) for cell in page.execute_script(
            f'return [...bars.querySelectorAll("td.{model}")].map(cell => cell.textContent)')]
        assert len(shares) == 10 and sum(shares) == pytest.approx(100, abs=1)
        winner, = page.execute_script(
            f'return [...bars.querySelectorAll("td.{model}.winner")].map('
            'cell => cell.parentNode.cells[0].textContent)')
        assert answer == winner == str(np.argmax(shares))
    assert text(page, 'sign') == ('=' if answers['deep'] == answers['softmax'] else '≠')
    tiles = painted(page, '#layers canvas')
    assert [name for name, _ in tiles] == [
        f'{tensor}, {kind} {number}' for tensor, kind, count in (
            ('conv1/Variable:0', 'filter', 32), ('conv1/Relu:0', 'feature', 32),
            ('pool1/MaxPool:0', 'feature', 32), ('conv2/Relu:0', 'feature', 64),
            ('pool2/MaxPool:0', 'feature', 64)) for number in range(count)]
    assert np.mean([seen for _, seen in tiles]) > 0.7
    assert painted(page, '#image') == [['What the networks see', True]]
    assert painted(page, '#evidence canvas') == [
        [f'Evidence for {digit}', True] for digit in range(10)]


def test_where_they_differ_it_is_marked(page):
    page.execute_script('show({deep: [.1, .9, 0, 0, 0, 0, 0, 0, 0, 0],'
                        ' softmax: [.6, .4, 0, 0, 0, 0, 0, 0, 0, 0]})')
    assert [text(page, name) for name in ('answer', 'sign', 'answer-softmax')] == ['1', '≠', '0']
    assert 'differ' in text(page, 'message')
    assert 'differ' in page.find_element('id', 'answers').get_attribute('class')


@pytest.mark.parametrize('width', [375, 1080, 1400])
def test_an_empty_page_invites_nothing_moves_at_the_first_stroke_and_nothing_lies_outside(
        width, page):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
        'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 1000})
    hint = page.find_element('id', 'hint')
    assert hint.is_displayed() and 'draw a digit here' in hint.text
    shown = painted(page, '#layers canvas, #evidence canvas, #image')
    assert {name.split(',')[0] for name, seen in shown if seen} == {'conv1/Variable:0'}
    measure = 'return [...document.querySelectorAll("section")].map(part => part.offsetHeight)'
    empty = page.execute_script(measure)
    draw(page, TEST.images[FIRST[3]])
    wait_for_answer(page)
    assert text(page, 'answer') != '' and not hint.is_displayed()
    assert page.execute_script(measure) == empty
    if width == 375:  # the answer and the bars stand directly below the paper
        tops = page.execute_script('return [paper, answers, bars, image].map('
                                   'element => element.getBoundingClientRect().top)')
        assert tops == sorted(tops)
    for size in ('200%', ''):
        page.execute_script(f'document.documentElement.style.fontSize = "{size}"')
        assert page.execute_script('return document.documentElement.scrollWidth') == width
        assert page.execute_script(
            'return document.getElementById("paper").getBoundingClientRect().width') >= 280
    page.find_element('id', 'clear').click()
    assert hint.is_displayed() and page.execute_script(measure) == empty
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


def test_a_feature_is_shown_large_with_its_name_and_its_filter(page):
    draw(page, TEST.images[FIRST[0]])
    wait_for_answer(page)
    found = '[aria-label="{}, feature {}"]'.format
    second, first = (page.find_element('css selector', found(layer, 17))
                     for layer in ('conv2/Relu:0', 'conv1/Relu:0'))
    page.execute_script('arguments[0].focus()', second)
    assert text(page, 'name').startswith('conv2/Relu:0, feature 17')
    assert page.execute_script('return large.width') == 14
    assert not page.find_element('id', 'filter').is_displayed()
    page.execute_script('arguments[0].dispatchEvent(new PointerEvent("pointermove", '
                        '{bubbles: true}))', first)
    assert text(page, 'name').startswith('conv1/Relu:0, feature 17')
    assert page.find_element('id', 'filter').is_displayed()
    of_filter, of_tile = page.execute_script(
        'return [filter, document.getElementById("conv1/Variable:0").children[17]].map(canvas => '
        '[...canvas.getContext("2d").getImageData(0, 0, 5, 5).data])')
    assert of_filter == of_tile and any(of_tile)


def test_each_layer_is_one_stop_of_tab_and_the_arrow_keys_go_on(page):
    page.execute_script('layers.querySelector("canvas").focus()')
    stops = []
    while page.execute_script('return layers.contains(document.activeElement)'):
        active = page.switch_to.active_element
        stops.append(active.get_attribute('aria-label'))
        active.send_keys('\ue004')  # Tab
    assert stops == ['conv1/Variable:0, filter 0', 'conv1/Relu:0, feature 0',
                     'pool1/MaxPool:0, feature 0', 'conv2/Relu:0, feature 0',
                     'pool2/MaxPool:0, feature 0']
    page.execute_script('document.getElementById("conv2/Relu:0").firstChild.focus()')
    for key, number in (('\ue014', 1), ('\ue015', 17), ('\ue012', 16), ('\ue013', 0),
                        ('\ue012', 0), ('\ue010', 63), ('\ue011', 0), ('\ue014', 1)):
        page.switch_to.active_element.send_keys(key)  # right, down, left, up, left, end, home
        assert text(page, 'name').startswith(f'conv2/Relu:0, feature {number}')
    active = page.switch_to.active_element
    active.send_keys('\ue004')
    page.switch_to.active_element.send_keys('\ue008\ue004')  # Shift and Tab: it comes back to it
    assert page.switch_to.active_element == active


def test_every_picture_has_a_name_for_screen_readers(page):
    assert page.execute_script('return [...document.querySelectorAll("canvas, svg, input")].filter('
                               'element => !element.ariaLabel).length') == 0


def give(page, body, way='dropped'):
    """Drops or pastes a file that holds these bytes."""
    event = {'dropped': 'new DragEvent("drop", {dataTransfer, bubbles: true})',
             'pasted': 'new ClipboardEvent("paste", {clipboardData: dataTransfer, bubbles: true})'}
    page.execute_script(
        'const bytes = Uint8Array.from(atob(arguments[0]), byte => byte.charCodeAt(0)), '
        'dataTransfer = new DataTransfer();'
        'dataTransfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));'
        f'document.body.dispatchEvent({event[way]})', base64.b64encode(body).decode())


@pytest.mark.parametrize('way', ['chosen', 'dropped', 'pasted'])
def test_a_picture_file_is_read_and_what_cannot_be_read_is_said(way, page, chromium, tmp_path):
    def hand_over(body):
        if way == 'chosen':
            (tmp_path / 'picture.png').write_bytes(body)
            page.find_element('id', 'file').send_keys(str(tmp_path / 'picture.png'))
        else:
            give(page, body, way)

    hand_over(png(TEST.images[FIRST[7]]))
    until(lambda: text(page, 'answer'), '7')
    assert not page.find_element('id', 'hint').is_displayed()
    dark = 'return pen.getImageData(0, 0, 560, 560).data.filter(level => level < 99).length'
    until(lambda: page.execute_script(dark) > 1000)  # it is shown on the paper
    draw(page, TEST.images[FIRST[1]])  # and a stroke begins a drawing of its own
    until(lambda: text(page, 'answer'), '1')
    hand_over(b'no picture')
    until(lambda: 'JPEG or PNG' in text(page, 'message'))
    assert text(page, 'answer') == ''
    refused, = chromium.get_log('browser')  # by the server: Chromium notes such a status itself
    assert '422' in refused['message']


def test_one_watches_it_learn_and_goes_back(page, process):
    draw(page, TEST.images[FIRST[7]])
    wait_for_answer(page)
    assert text(page, 'training') == ''
    bars = ('return [...document.querySelectorAll("td.deep")].map(cell => cell.textContent)')
    finished = page.execute_script(bars)
    page.find_element('id', 'learn').click()
    until(lambda: re.fullmatch(r'step \d+ of 20,000, test accuracy \d+ %', text(page, 'training'))
          is not None)
    scratch = page.execute_script(bars)
    assert scratch != finished
    until(lambda: page.execute_script(bars) != scratch)  # without a stroke
    filters = painted(page, '[id="conv1/Variable:0"] canvas')
    assert len(filters) == 32 and all(seen for _, seen in filters)
    until(lambda: page.execute_script(
        'return curve.querySelector("path.deep").getAttribute("d").length') > 10)
    draw(page, TEST.images[FIRST[1]])  # drawing while it learns
    wait_for_answer(page)
    assert text(page, 'answer') != ''
    page.find_element('id', 'back').click()
    until(lambda: text(page, 'training'), '')
    assert state(process)['finished'] and page.find_element('id', 'learn').is_displayed()
    assert not page.find_element('id', 'back').is_displayed()
