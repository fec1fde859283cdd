"""Real browsers for the tests of the page: they are started, and draw with a pointer."""

import json
import shutil
import socket
import subprocess
import time

import numpy as np
from scipy import ndimage
from selenium import webdriver
from selenium.webdriver.remote.command import Command

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
FIREFOX = shutil.which('firefox-esr') or shutil.which('firefox')


def start_chromium(profile, width=1400, height=1000):
    """A Chromium without a screen; `profile` is an empty folder."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ('--headless=new', '--no-sandbox', '--disable-gpu', '--no-first-run',
                 '--disable-background-networking', '--disable-component-update',
                 '--disable-sync', '--hide-scrollbars', f'--user-data-dir={profile}',
                 f'--window-size={width},{height}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def strokes(image):
    """The lines that a pen goes along to write one of MNIST's digits, float32 [784].

    Returns:
        List of strokes, each a list of (row, column) in 28x28.
    """
    ink = image.reshape(28, 28) > 0.5
    depth = ndimage.distance_transform_edt(np.pad(ink, 1))[1:-1, 1:-1]
    around = ndimage.maximum_filter(depth, footprint=[[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    ridge = depth >= around - 0.42
    left = {(int(y), int(x)) for y, x in np.argwhere(ink & ridge)}
    found = []
    while left:
        way = [min(left)]  # where the pen stands, and how it came there
        stroke = list(way)
        left.discard(way[0])
        while way:
            y, x = way[-1]
            near = [(row - y) ** 2 + (column - x) ** 2 for row, column in sorted(left)]
            if near and min(near) <= 8:
                way.append(sorted(left)[int(np.argmin(near))])
                left.discard(way[-1])
                stroke.append(way[-1])
            else:  # back to where another stroke begins
                way.pop()
                if len(stroke) > 1:
                    found.append(stroke)
                stroke = way[-1:]
    return found


class Firefox:
    """A Firefox without a screen, with what the tests ask of selenium's browsers.

    selenium needs geckodriver for it, which Debian does not have, and the package marionette_driver
    needs telnetlib, which Python 3.13 does not have. Firefox's own protocol takes WebDriver's
    commands: https://firefox-source-docs.mozilla.org/testing/marionette/Protocol.html

    Args:
        profile: pathlib.Path of an empty folder.
        preferences: dict, those of about:config that are not as usual.
    """

    def __init__(self, profile, preferences=()):
        (profile / 'user.js').write_text(''.join(
            f'user_pref({json.dumps(name)}, {json.dumps(value)});\n'
            for name, value in {**dict(preferences), 'marionette.port': 0}.items()))
        self.process = subprocess.Popen(
            [FIREFOX, '--headless', '--marionette', '--no-remote', '--profile', profile],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = profile / 'MarionetteActivePort'
        while not (port.exists() and port.read_text()):
            assert self.process.poll() is None, 'Firefox has ended'
            time.sleep(0.05)
        self.socket = socket.create_connection(('127.0.0.1', int(port.read_text())))
        self.file, self.number = self.socket.makefile('rb'), 0
        self.receive()  # its greeting
        self.send('WebDriver:NewSession', {})

    def receive(self):
        length = b''
        while not length.endswith(b':'):
            length += self.file.read(1)
        return json.loads(self.file.read(int(length[:-1])))

    def send(self, command, parameters):
        self.number += 1
        message = json.dumps([0, self.number, command, parameters]).encode()
        self.socket.sendall(b'%d:%b' % (len(message), message))
        _, number, error, result = self.receive()
        assert (number, error) == (self.number, None), error
        return result

    def get(self, url):
        self.send('WebDriver:Navigate', {'url': url})

    def execute_script(self, script, *arguments):
        return self.send('WebDriver:ExecuteScript', {'script': script, 'args': arguments})['value']

    def execute(self, command, parameters):
        assert command == Command.W3C_ACTIONS
        self.send('WebDriver:PerformActions', parameters)

    def quit(self):
        self.process.kill()
        self.process.wait()
        self.file.close()
        self.socket.close()


def draw(browser, image, kind='mouse', palm=False):
    """Draws one of MNIST's digits, float32 [784], onto the page's paper."""
    perform(browser, kind, [
        [((row + 0.5) * 20, (column + 0.5) * 20) for row, column in [way[0], *way[4::4], way[-1]]]
        for way in strokes(image)], palm)


def perform(browser, kind, ways, palm=False):
    """Moves a pointer over the page's paper.

    Args:
        kind: the pointer's: mouse, pen or touch.
        ways: list of strokes, each a list of (row, column) in the paper's 560 pixels.
        palm: whether a second pointer lies on the paper, trembling.
    """
    left, top, width = browser.execute_script(
        'const box = document.getElementById("paper").getBoundingClientRect();'
        'return [box.left, box.top, box.width]')

    def move(row, column):
        return {'type': 'pointerMove', 'duration': 0, 'origin': 'viewport',
                'x': round(left + column * width / 560), 'y': round(top + row * width / 560)}
    down, up = {'type': 'pointerDown', 'button': 0}, {'type': 'pointerUp', 'button': 0}
    drawing, resting = [], []
    for first, *others in ways:
        drawing += [move(*first), down, *[move(*place) for place in others], up]
        resting += [{'type': 'pause'}, {'type': 'pause'}, move(500, 500), down,
                    *[move(500 - 9 * (i % 2), 500) for i in range(len(others) - 3)], up]
    browser.execute(Command.W3C_ACTIONS, {'actions': [
        {'type': 'pointer', 'id': name, 'parameters': {'pointerType': pointer}, 'actions': actions}
        for name, pointer, actions in [(kind, kind, drawing),
                                       *[('palm', 'touch', resting)] * palm]]})
