"""The codec of the shared block: what decodes, what is refused, byte for byte what is written."""
import json
import os
import time

import flom
import pytest
from world import COUNT, DATA, chance

HEADER = b'<?xml version="1.0" encoding="UTF-8" ?>'
LOCK = (b'<msg level="3" verb="1" step="8"><session peerid="0123456789abcdef0123456789abcdef"/>'
        b'<resource name="UjE=" mode="5" wait="1" create="0" lifespan="7"/></msg>')
DECODED = {"msg": {"level": 3, "verb": 1, "step": 8},
           "session": {"peerid": "0123456789abcdef0123456789abcdef"},
           "resource": {"name": "UjE=", "mode": 5, "wait": 1, "create": 0, "lifespan": 7}}


def vectors(name="vectors.json"):
    with open(os.path.join(DATA, name), encoding="utf-8") as file:
        return json.load(file)


VECTORS = [pytest.param(vector["text"].encode(), id=f"{number}:{vector['name']}")
           for number, vector in enumerate(vectors())]


def encode_again(elements, attributes):
    """The message of decoded elements; FLoM writes a blank before the end of an unlock's."""
    texts = [flom.element(tag, *pairs.items(), end=" />" if "rollback" in pairs else "/>")
             for tag, pairs in elements.items() if tag != "msg"]
    return flom.encode(elements["msg"]["verb"], elements["msg"]["step"], *texts, **attributes)


@pytest.mark.parametrize("data", VECTORS)
def test_captured_messages_decode_and_encode_to_the_same_bytes(data):
    elements = flom.decode(data)
    assert elements["msg"]["level"] == 3
    assert encode_again(elements, {}) == data


def test_a_message_decodes_with_numbers_as_numbers():
    assert flom.decode(HEADER + LOCK) == DECODED


TOLERATED = {
    "no header": LOCK,
    "single quotes": (HEADER + LOCK).replace(b'"', b"'"),
    "blanks between elements": HEADER + b"\n  " + LOCK.replace(b"><", b">\r\n\t <"),
    "blanks in tags": HEADER + LOCK.replace(b'"/>', b'"  />').replace(b"=", b" =\n ").replace(
        b"UjE =\n ", b"UjE="),
    "a pair of tags": HEADER + LOCK.replace(b'"/><res', b'"></session><res'),
    "unknown empty element": HEADER + LOCK.replace(b"<session", b"<extra/><session"),
    "unknown element around nothing": HEADER + LOCK.replace(b"<session", b"<x><y/></x><session"),
    "a character as a number": HEADER + LOCK.replace(b"UjE=", b"&#85;&#x6a;E&#61;"),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_floms_reader_takes_is_taken(name):
    elements = flom.decode(TOLERATED[name])
    assert {tag: elements[tag] for tag in DECODED} == DECODED


def test_attributes_in_any_order_and_unknown_ones():
    data = (b'<msg step="24" more="1" verb="1" level="3">'
            b'<answer element="red" x="" rc="0"/></msg>')
    assert flom.decode(data)["answer"] == {"element": "red", "x": "", "rc": 0}


def test_entities():
    data = b'<msg verb="1" step="24"><answer element="&lt;&gt;&amp;&quot;&apos;&#10;&#xe9;"/></msg>'
    assert flom.decode(data)["answer"]["element"] == "<>&\"'\n\xe9"


REFUSED = {
    "nothing": b"",
    "text": b"hello</msg>",
    "text after an element": LOCK.replace(b"/><", b"/>text<"),
    "not UTF-8": LOCK.replace(b"abcdef", b"abc\xff\xfe"),
    "comment": LOCK.replace(b"<session", b"<!-- x --><session"),
    "CDATA": LOCK.replace(b"<session", b"<![CDATA[x]]><session"),
    "DOCTYPE": HEADER + b"<!DOCTYPE msg>" + LOCK,
    "processing instruction": LOCK.replace(b"<session", b"<?x y?><session"),
    "unknown element with attributes": LOCK.replace(b"<session", b'<x y="1"/><session'),
    "mismatched tags": b"<foo></msg>",
    "crossed tags": b'<msg verb="3" step="8"><a><b></a></b></msg>',
    "never ends": b'<msg verb="3" step="8"><a></msg>',
    "ends twice": b'<msg verb="3" step="8"></msg></msg>',
    "message in a message": b'<msg verb="3" step="8"><msg verb="3" step="8"></msg></msg>',
    "two messages": LOCK + LOCK,
    "not msg": b'<session peerid="x"/>',
    "no verb": b'<msg step="8"></msg>',
    "no step": b'<msg verb="1"></msg>',
    "attribute twice": LOCK.replace(b'mode="5"', b'mode="5" mode="5"'),
    "element twice": LOCK.replace(b"<resource", b"<session/><resource"),
    "no quotes": LOCK.replace(b'"5"', b"5"),
    "open quotes": LOCK.replace(b'"5"', b'"5'),
    "unknown entity": LOCK.replace(b"UjE=", b"&nbsp;"),
    "bare ampersand": LOCK.replace(b"UjE=", b"a&b"),
    "character 0": LOCK.replace(b"UjE=", b"&#0;"),
    "a surrogate": LOCK.replace(b"UjE=", b"&#xD800;"),
    "beyond Unicode": LOCK.replace(b"UjE=", b"&#x110000;"),
    "level 4": LOCK.replace(b'level="3"', b'level="4"'),
    "verb 6": LOCK.replace(b'verb="1"', b'verb="6"'),
    "verb 0": LOCK.replace(b'verb="1"', b'verb="0"'),
    "verb in words": LOCK.replace(b'verb="1"', b'verb="lock"'),
    "mode 6": LOCK.replace(b'mode="5"', b'mode="6"'),
    "mode -1": LOCK.replace(b'mode="5"', b'mode="-1"'),
    "mode with text": LOCK.replace(b'mode="5"', b'mode="5x"'),
    "mode with a blank": LOCK.replace(b'mode="5"', b'mode=" 5"'),
    "empty mode": LOCK.replace(b'mode="5"', b'mode=""'),
    "other digits": LOCK.replace(b'mode="5"', 'mode="\u0665"'.encode()),
    "wait 2": LOCK.replace(b'wait="1"', b'wait="2"'),
    "lifespan below 0": LOCK.replace(b'lifespan="7"', b'lifespan="-1"'),
    "lifespan too long": LOCK.replace(b'lifespan="7"', b'lifespan="2147483648"'),
    "many digits": LOCK.replace(b'lifespan="7"', b'lifespan="%s"' % (b"9" * 5000)),
    "quantity 0": LOCK.replace(b'mode="5"', b'quantity="0"'),
    "port 0": b'<msg verb="4" step="16"><network address="" port="0"/></msg>',
    "port 65536": b'<msg verb="4" step="16"><network address="" port="65536"/></msg>',
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_malformed_is_refused(name):
    with pytest.raises(flom.ProtocolError):
        flom.decode(REFUSED[name])


def test_values_are_escaped_and_come_back():
    value = "a<b>c&d\"e'f"
    data = flom.encode(flom.LOCK, 24, flom.element("answer", ("rc", 4), ("reason", value)))
    assert data.count(b"<") == 4
    assert b"&amp;" in data
    assert b"&quot;" in data
    assert flom.decode(data)["answer"] == {"rc": 4, "reason": value}


def test_an_attribute_without_a_value_is_left_out():
    assert flom.element("answer", ("rc", 0), ("element", None)) == '<answer rc="0"/>'
    assert flom.element("network", ("address", ""), ("port", 9)) == '<network address="" port="9"/>'


def test_our_attributes_of_the_message_itself():
    data = flom.encode(flom.DISCOVER, 8, daemon="00ff00ff00ff00ff", started=1790000000000)
    assert data.endswith(b' step="8" daemon="00ff00ff00ff00ff" started="1790000000000"></msg>')
    assert flom.decode(data)["msg"]["started"] == 1790000000000


NAMES = ["R1", "_RESOURCE", "/srv/db", "a[5]", "/a b/\xe9\u20ac", "/\udcff\udcfe", "x" * 300]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_travel_in_base64(name):
    text = flom.encode_name(name)
    assert text.isascii() if hasattr(text, "isascii") else text.encode("ascii")
    assert flom.decode_name(text) == name


@pytest.mark.parametrize("text", ["UjE", "U", "Uj E=", "=UjE", "UjE=\n", "Uj-_", "====", "\xe9AAA"])
def test_what_is_no_base64_is_refused(text):
    with pytest.raises(flom.ProtocolError):
        flom.decode_name(text)


def a_message(draw):
    """A random message: (verb, step, {tag: {attribute: value}})."""
    def word():
        letters = "ab19 <>&\"'=/\t\xe9\u20ac"
        return "".join(draw.choice(letters) for _ in range(draw.randrange(9)))
    pairs = {"session": {"peerid": word(), "user": word()},
             "resource": {"name": word(), "mode": draw.randrange(6), "wait": draw.randrange(2)},
             "answer": {"rc": draw.randrange(-14, 9), "element": word()}}
    tags = [tag for tag in pairs if draw.random() < 0.7]
    return draw.randint(1, 5), draw.randrange(100), {tag: pairs[tag] for tag in tags}


def ascii_only(elements):
    return {tag: {key: value if isinstance(value, int) else ascii(value)[1:-1]
                  for key, value in pairs.items()} for tag, pairs in elements.items()}


def test_random_messages_make_the_round_trip():
    draw = chance("messages")
    for _ in range(COUNT.messages):
        verb, step, elements = a_message(draw)
        elements = ascii_only(elements)
        data = flom.encode(verb, step, *[flom.element(tag, *pairs.items())
                                         for tag, pairs in elements.items()])
        decoded = flom.decode(data)
        assert decoded.pop("msg") == {"level": 3, "verb": verb, "step": step}
        assert decoded == elements


def test_damaged_messages_are_decoded_or_refused():
    """Nothing but ProtocolError comes out of a message with a few bytes changed."""
    draw, refused = chance("damage"), 0
    for _ in range(COUNT.messages):
        data = bytearray(HEADER + LOCK)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data))
            any_byte = bytes([draw.randrange(256)])
            damage = draw.choice([b"", b"<", b'"', b"&", b">", b"/", any_byte])
            data[place:place + draw.randrange(3)] = damage
        try:
            assert flom.decode(bytes(data))["msg"]["verb"] in range(1, 6)
        except flom.ProtocolError:
            refused += 1
    assert 0 < refused < COUNT.messages


def test_a_long_message_decodes_in_time_that_grows_with_its_length():
    """64 KiB of blanks, quotes or tags take no time worth mentioning."""
    started = time.process_time()
    for filler in (b" ", b"<a/>", b'"', b"x=", b"<", b"&amp;", b"<a "):
        data = b'<msg verb="1" step="8">' + filler * (65000 // len(filler)) + b"</msg>"
        try:
            flom.decode(data)
        except flom.ProtocolError:
            pass
    assert time.process_time() - started < 5


KINDS = {
    "simple": ["_RESOURCE", "a", "Z9", "backup"],
    "numeric": ["licence[5]", "a[05]", "a[2147483647]", "a[0]"],
    "set": ["red.green.blue", "a.a"],
    "hierarchical": ["/srv/db/orders", "/a b/.", "/\xe9/<&>\"'", "/_"],
    "sequence": ["_s_a[1]", "_S_invoice[2147483647]"],
    "timestamp": ["_t_%H:%M:%S#fff[2]", "_t_#f[1]", "_t_a[1]"],
    None: ["", "_a", "_STATUS", "9a", "a b", "a\n", "a-b", "a[]", "a[-1]", "a[x]", "a[1]b",
           "a[2147483648]", "a[4294967297]", "a.", ".a", "a..b", "a.9", "/", "//a", "/a/", "/a\\b",
           "/a\nb", "a/b", "_s_[1]", "_s_a", "_s_a[0]", "_x_a[1]", "_t_[1]", "_t_%d[0]",
           "_t_9[1]", "\xe9", "a\n[5]", "/a\n"],
}


@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in KINDS[kind]],
                         ids=ascii)
def test_the_kind_of_a_name(kind, name):
    assert flom.kind_of(name) == kind


def test_the_size_in_a_name():
    names = ("a[5]", "a[05]", "_s_a[17]", "_t_%d[3]")
    assert [flom.size_of(name) for name in names] == [5, 5, 17, 3]


@pytest.mark.parametrize("more, right", [(997, True), (998, False), (9000, False)])
def test_a_message_has_a_thousand_tags_at_most(more, right):
    """What is unknown is skipped, but not as long as somebody likes."""
    tags = "".join(f"<a{number}/>" for number in range(more))
    data = f'<msg verb="1" step="8"><resource name="UjE="/>{tags}</msg>'.encode()
    if right:
        assert flom.decode(data)["resource"] == {"name": "UjE="}
    else:
        with pytest.raises(flom.ProtocolError):
            flom.decode(data)
