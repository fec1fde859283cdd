"""Part five of the tutorial: the server of the page, and the page in a real Chromium."""

import base64
import concurrent.futures
import functools
import http.client
import io
import json
import re
import signal
import socket
import sys
import threading
import time

import forked
import numpy as np
import psutil
import pytest
from browser import CHROMIUM, DRIVER, draw, start_chromium
from conftest import DATA, ENVIRONMENT, ROOT, own_lines, start
from PIL import Image

import input_data
import mnist_deep
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


@pytest.fixture(scope='module')
def process(trained):
    """mnist_draw.py with a network of a few hundred steps, and its address."""
    running = start('-m', 'extras.draw', '--model_dir', trained[0], '--port', 0, '--no_browser')
    running.address = running.stdout.readline().strip()
    yield running
    running.kill()
    running.communicate()


@pytest.fixture
def ask(process):
    """Sends a request; the status, the headers and the body of the answer."""
    def ask(method, path, body=None, **headers):
        connection = http.client.HTTPConnection('127.0.0.1', port(process), timeout=60)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    return ask


def port(process):
    return int(re.fullmatch(r'http://127\.0\.0\.1:(\d+)/', process.address)[1])


# The networks

def test_a_drawing_is_read_by_both_networks_and_the_layers_are_told(ask):
    drawing = png(TEST.images[FIRST[7]])
    status, _, body = ask('POST', '/read', drawing)
    answer = json.loads(body)
    assert status == 200 and answer['digit'] == 7
    for model in ('deep', 'softmax'):
        assert np.argmax(answer[model]) == 7
        assert sum(answer[model]) == pytest.approx(1, abs=1e-4)
    seen = pictures.normalise(pictures.open_picture(io.BytesIO(drawing)))
    assert (np.array(answer['image']) == np.round(seen.reshape(28, 28) * 255)).all()
    layers = {name: np.array(features) for name, features in answer['layers'].items()}
    assert {name: features.shape for name, features in layers.items()} == {
        'conv1/Relu:0': (32, 28, 28), 'pool1/MaxPool:0': (32, 14, 14),
        'conv2/Relu:0': (64, 14, 14), 'pool2/MaxPool:0': (64, 7, 7)}
    conv1, pool1, conv2, pool2 = layers.values()
    for layer, pooled in ((conv1, pool1), (conv2, pool2)):
        assert layer.max() == 255
        blocks = layer.reshape(len(layer), pooled.shape[1], 2, pooled.shape[2], 2)
        assert (blocks.max((2, 4)) == pooled).all()


def test_twenty_clients_at_once_get_the_answers_that_one_gets(ask):
    drawings = [png(TEST.images[number]) for number in FIRST] * 2
    alone = [ask('POST', '/read', drawing)[2] for drawing in drawings]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda drawing: ask('POST', '/read', drawing)[2], drawings))
    for one, other in zip(map(json.loads, alone), map(json.loads, together)):
        assert one['digit'] == other['digit'] and one['image'] == other['image']
        assert one['deep'] == pytest.approx(other['deep'], abs=1e-4)
    digits = [json.loads(body)['digit'] for body in alone]
    assert np.mean(np.equal(digits, [*range(10)] * 2)) >= 0.8


# The server

def test_it_serves_the_page_and_no_other_file(ask):
    status, headers, body = ask('GET', '/')
    assert (status, body) == (200, (ROOT / 'extras' / 'draw.html').read_bytes())
    assert headers['Content-Type'] == 'text/html; charset=utf-8'
    policy = headers['Content-Security-Policy']
    assert "default-src 'none'" in policy and 'unsafe' not in policy
    for path in ('/draw.html', '/extras/draw.py', '/read', '/../input_data.py', '/?x'):
        assert ask('GET', path)[0] == 404, path


def test_the_page_takes_nothing_from_elsewhere():
    page = (ROOT / 'extras' / 'draw.html').read_text()
    assert not re.search(r'(src|href|url|import)\W{1,3}(https?:)?//', page)


@pytest.mark.parametrize('host, origin, status', [
    ('127.0.0.1:PORT', None, 200), ('localhost:PORT', None, 200), ('[::1]:PORT', None, 200),
    ('127.0.0.1:PORT', 'http://127.0.0.1:PORT', 200),
    ('localhost:PORT', 'http://localhost:PORT', 200),
    ('127.0.0.1', None, 403), ('127.0.0.1:1', None, 403), ('example.org:PORT', None, 403),
    ('127.0.0.1:PORT', 'http://example.org', 403), ('127.0.0.1:PORT', 'null', 403),
    ('127.0.0.1:PORT', 'https://127.0.0.1:PORT', 403)])
@pytest.mark.parametrize('method, path', [('GET', '/'), ('POST', '/read')])
def test_only_its_own_page_may_ask(method, path, host, origin, status, process, ask):
    headers = {'Host': host.replace('PORT', str(port(process)))}
    if origin:
        headers['Origin'] = origin.replace('PORT', str(port(process)))
    body = png(TEST.images[0]) if method == 'POST' else None
    assert ask(method, path, body, **headers)[0] == status


def test_it_listens_on_this_machine_alone(process):
    listening = [connection.laddr.ip for connection in psutil.Process(process.pid).net_connections()
                 if connection.status == psutil.CONN_LISTEN]
    assert listening == ['127.0.0.1']


def test_what_is_no_question_gets_a_status_and_the_server_goes_on(ask, process):
    assert ask('POST', '/', b'x')[0] == 404
    assert ask('PUT', '/read', b'x')[0] == ask('DELETE', '/')[0] == 501
    assert ask('POST', '/read', iter([b'x']))[0] == 411  # in chunks, without a length
    assert ask('POST', '/read', b'x', **{'Content-Length': '-1'})[0] == 411
    assert ask('POST', '/read', bytes(20_000_001))[0] == 413
    for broken in (b'', b'no picture', png(TEST.images[0])[:200]):
        status, _, body = ask('POST', '/read', broken)
        assert status == 422 and json.loads(body).keys() == {'message'}, broken[:20]
    empty = io.BytesIO()
    Image.new('L', (280, 280), 255).save(empty, 'PNG')
    status, _, body = ask('POST', '/read', empty.getvalue())
    assert status == 200 and 'no digit' in json.loads(body)['message']
    with socket.create_connection(('127.0.0.1', port(process))) as gone:
        gone.sendall(b'POST /read HTTP/1.1\r\nContent-Le')
    with socket.create_connection(('127.0.0.1', port(process))) as nonsense:
        nonsense.sendall(b'\x16\x03\x01\x00\r\n\r\n')
        assert b'400' in nonsense.recv(1000)
    assert ask('GET', '/')[0] == 200


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


def test_a_port_that_is_taken_and_a_folder_without_a_network_are_one_line(
        process, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['draw.py'])  # the line begins with it
    for flags, message in ((['--port', str(port(process))],
                            f'--port {port(process)}: Address already in use; name'),
                           (['--port=0', '--model_dir', str(tmp_path)],
                            'no checkpoint of a trained network there; train one with: ')):
        assert mnist_deep.run(functools.partial(drawing_page.main, ['--no_browser', *flags])) == 2
        output, errors = capsys.readouterr()
        line, = errors.splitlines()
        assert line.startswith('draw.py: error: --') and message in line and output == ''


@pytest.mark.parametrize('number', [-1, 65536])
def test_a_port_out_of_range_is_refused(number):
    with pytest.raises(OSError, match=f'--port {number}: .*must be 0-65535.*; name another'):
        drawing_page.main([f'--port={number}'])


def test_it_opens_the_browser_and_ctrl_c_ends_it_with_one_line(trained, tmp_path):
    browser = tmp_path / 'browser'
    browser.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened.part\n'
                       f'mv {tmp_path}/opened.part {tmp_path}/opened\n')
    browser.chmod(0o755)
    process = forked.start('-m', 'extras.draw', '--model_dir', trained[0], '--port=0',
                           env={**ENVIRONMENT, 'BROWSER': str(browser)})
    address = process.stdout.readline()
    while not (tmp_path / 'opened').exists():
        assert process.poll() is None
        time.sleep(0.01)
    assert (tmp_path / 'opened').read_text() == address
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, own_lines(errors)) == (130, '', 'stopped\n')


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


def feature_pictures(page):
    """(name, whether something is to be seen) of each feature's picture."""
    return page.execute_script(
        'return [...document.querySelectorAll("#layers canvas")].map(canvas => [canvas.ariaLabel,'
        ' canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.some('
        '(value, i) => i % 4 < 3 && value > 0)])')


def test_drawn_digits_are_read_and_cleared(page, trained):
    right = 0
    for digit, number in enumerate(FIRST):
        assert text(page, 'answer') == ''
        draw(page, TEST.images[number])
        until(lambda: page.execute_script('return !asking && !next'))
        right += text(page, 'answer') == str(digit)
        if digit % 2:
            page.find_element('id', 'clear').click()
        else:
            page.find_element('tag name', 'body').send_keys('\ue00c')  # Escape
    assert right >= 8  # of a network that has trained for 200 steps


def test_a_stroke_that_comes_while_the_paper_is_packed_is_asked_about_next(page):
    asked = page.execute_async_script("""
        const [done] = arguments, pack = paper.toBlob.bind(paper), usual = fetch;
        let asked = 0;
        paper.toBlob = then => setTimeout(() => pack(then), 100);
        fetch = (...question) => { asked += 1; return usual(...question); };
        ask(paper);
        setTimeout(() => ask(paper), 20);
        setTimeout(function wait() {
          if (asking) setTimeout(wait, 10);
          else done(asked);
        }, 50);""")
    assert asked == 2


def test_bars_pixels_and_features_are_shown(page):
    assert feature_pictures(page) == []
    draw(page, TEST.images[FIRST[0]])
    until(lambda: page.execute_script('return !asking && !next'))
    shares = [[float(bar.rstrip('%')) for bar in page.execute_script(
        f'return [...document.querySelectorAll(".{model}")].map(bar => bar.textContent)')]
        for model in ('deep', 'softmax')]
    for ten in shares:
        assert len(ten) == 10 and sum(ten) == pytest.approx(100, abs=1)
    assert int(np.argmax(shares[0])) == int(text(page, 'answer'))
    pictures = feature_pictures(page)
    assert [name for name, _ in pictures] == [
        f'{layer}, feature {number}' for layer, count in (
            ('conv1/Relu:0', 32), ('pool1/MaxPool:0', 32), ('conv2/Relu:0', 64),
            ('pool2/MaxPool:0', 64)) for number in range(count)]
    assert np.mean([seen for _, seen in pictures]) > 0.8


def test_a_feature_is_shown_large_with_its_name(page):
    draw(page, TEST.images[FIRST[0]])
    until(lambda: page.execute_script('return !asking && !next'))
    feature = page.find_element('css selector', '[aria-label="conv2/Relu:0, feature 17"]')
    page.execute_script('arguments[0].focus()', feature)
    assert text(page, 'name') == 'conv2/Relu:0, feature 17'
    feature.send_keys('\ue004')  # Tab
    assert text(page, 'name') == 'conv2/Relu:0, feature 18'
    assert page.execute_script('return document.getElementById("large").width') == 14
    page.execute_script('arguments[0].dispatchEvent(new PointerEvent("pointerover", '
                        '{bubbles: true}))', feature)
    assert text(page, 'name') == 'conv2/Relu:0, feature 17'


@pytest.mark.parametrize('way', ['chosen', 'dropped', 'pasted'])
def test_a_picture_file_is_read_and_what_cannot_be_read_is_said(way, page, chromium, tmp_path):
    def give(body):
        if way == 'chosen':
            (tmp_path / 'picture.png').write_bytes(body)
            page.find_element('id', 'file').send_keys(str(tmp_path / 'picture.png'))
            return
        event = {'dropped': 'new DragEvent("drop", {dataTransfer, bubbles: true})',
                 'pasted': 'new ClipboardEvent("paste", {clipboardData: dataTransfer, '
                           'bubbles: true})'}[way]
        page.execute_script(
            'const bytes = Uint8Array.from(atob(arguments[0]), byte => byte.charCodeAt(0)), '
            'dataTransfer = new DataTransfer();'
            'dataTransfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));'
            f'document.body.dispatchEvent({event})', base64.b64encode(body).decode())

    give(png(TEST.images[FIRST[7]]))
    until(lambda: text(page, 'answer'), '7')
    give(b'no picture')
    until(lambda: 'JPEG or PNG' in text(page, 'message'))
    assert text(page, 'answer') == ''
    refused, = chromium.get_log('browser')  # by the server: Chromium notes such a status itself
    assert '422' in refused['message']


@pytest.mark.parametrize('width', [375, 1400])
def test_nothing_lies_outside_a_narrow_or_a_wide_window(width, page):
    page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
        'width': width, 'height': 800, 'deviceScaleFactor': 1, 'mobile': width < 1000})
    draw(page, TEST.images[FIRST[3]])
    until(lambda: text(page, 'answer') != '')
    for size in ('', '200%'):
        page.execute_script(f'document.documentElement.style.fontSize = "{size}"')
        assert page.execute_script('return document.documentElement.scrollWidth') == width
        assert page.execute_script(
            'return document.getElementById("paper").getBoundingClientRect().width') >= 280
    page.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
