"""The rules of a quorum, one by one: records, candidates, the chain of the leader, its end."""
import json

import pytest

import flomd
from quorum_world import (CLUSTER, LEADER, MARK, PREFIX, Digits, Etcd, Now, ask, candidate, leader,
                          own_record, quorum)

UNKNOWN, NOT_DONE = flomd.failure(flomd.UNKNOWN), flomd.failure(flomd.NOT_DONE)
STRANGER = "1"


@pytest.fixture
def etcd():
    return Etcd()


def record_in(etcd):
    return flomd.record_of(etcd.text(LEADER))


def put_record(etcd, **fields):
    """As another daemon writes it."""
    record = own_record("z", **dict(dict(term="t", n=1, x="x"), **fields))
    etcd.change([(LEADER, flomd.text_of(record)), (MARK, "m")])


# Tables

@pytest.mark.parametrize("status, outcome", [
    (200, flomd.DONE), (400, flomd.NOT_DONE), (401, flomd.NOT_DONE), (403, flomd.NOT_DONE),
    (404, flomd.NOT_DONE), (412, flomd.NOT_DONE), (429, flomd.NOT_DONE), (500, flomd.UNKNOWN),
    (503, flomd.UNKNOWN), (504, flomd.UNKNOWN), (302, flomd.UNKNOWN),
    (flomd.NO_ANSWER, flomd.UNKNOWN)])
def test_outcomes(status, outcome):
    assert flomd.outcome_of(status) == outcome


def test_times_are_parts_of_the_ttl():
    times = flomd.Times(10000)
    assert (times.ttl, times.margin, times.lead) == (10, 1, 9)
    assert (times.beat, times.pause, times.copy) == (2, 0.5, 1)
    assert flomd.Times(5000).copy == 1 and flomd.Times(60000).copy == 6
    assert flomd.ping_interval(10000) == 2000


@pytest.mark.parametrize("ttl, kill, grace", [
    (10000, 5000, 25000), (10000, 0, 25000), (10000, 8000, 28000), (5000, 5000, 17500)])
def test_grace(ttl, kill, grace):
    assert flomd.grace_for(ttl, kill) == grace


def test_the_longest_grace_can_be_told():
    grace = flomd.grace_for(60000, flomd.MOST)
    data = flomd.encode(1, 16, flomd.element("session", ("grace", grace)))
    assert flomd.decode(data)["session"]["grace"] == grace > flomd.MOST


def test_an_absent_holder_is_kept_for_the_longest_grace():
    assert flomd.kept_until(100, 25000, 30000) == 130
    assert flomd.kept_until(100, 30000, 25000) == 130


def test_only_an_orderly_end_releases():
    assert [end for end, frees in flomd.RELEASES.items() if frees] == ["unlock", "end of file"]


def test_the_epoch_is_above_all_that_was():
    record = own_record(epoch=5)
    assert flomd.epoch_after(3, record, []) == 6
    assert flomd.epoch_after(9, record, []) == 9
    assert flomd.epoch_after(3, record, [7 << 32, (8 << 32) + 1]) == 9


# The leader record

def test_a_record_has_one_text():
    record = own_record(term="t", n=3)
    text = flomd.text_of(record)
    assert " " not in text and list(json.loads(text)) == sorted(flomd.Record._fields)
    assert flomd.record_of(text) == record and tuple(flomd.FIELDS) == flomd.Record._fields
    assert flomd.is_free(own_record()) and not flomd.is_free(record)


@pytest.mark.parametrize("text, why", [
    ("", "damaged"), ("[" * 100000, "damaged"), ("[1]", "damaged"), ('{"v":2}', "newer layout 2"),
    ('{"v":1}', "no proper term"),
    (flomd.text_of(own_record(ttl="10")), "no proper ttl"),
    (flomd.text_of(own_record(n=True)), "no proper n"),
    (flomd.text_of(own_record(ttl=0)), "no proper ttl"),
    (flomd.text_of(own_record(ttl=2 ** 31)), "no proper ttl"),
    (flomd.text_of(own_record(epoch=2 ** 31)), "no proper epoch"),
    (flomd.text_of(own_record(epoch=10 ** 99)), "damaged"),
    (flomd.text_of(own_record(host="x\nMAINPID=1")), "no proper host"),
    (flomd.text_of(own_record(address="10.77.0.1")), "no proper address"),
    (flomd.text_of(own_record(address="10.77.0.1:x")), "no proper address")])
def test_a_strange_record(text, why):
    with pytest.raises(flomd.UnreadableRecord) as error:
        flomd.record_of(text)
    assert why in str(error.value)


# Candidates

def test_a_candidate_looks_every_200_ms(etcd):
    put_record(etcd)
    one = candidate(etcd)
    assert one.next_date() == flomd.POLL
    assert one.next_request(Now(0.19)) is None
    request = one.next_request(Now(0.2))
    assert isinstance(request, flomd.Range)
    assert request.first <= MARK < LEADER < request.end
    assert one.next_request(Now(9)) is None  # one request at a time
    assert one.record.daemon == "z" * 16 and one.trouble == ""


def test_a_record_that_stands_still_is_claimed(etcd):
    """After the ttl that it says, not one's own."""
    put_record(etcd, ttl=20000)
    one = candidate(etcd)
    ask(one, etcd, 20)
    assert one.leader is None
    ask(one, etcd, 20.3)
    assert one.leader is not None and record_in(etcd).daemon == "a" * 16
    assert record_in(etcd).n == 1 and len(record_in(etcd).term) == 16


def test_it_counts_from_the_answer(etcd):
    put_record(etcd)
    one = flomd.Candidate(quorum(), Now(0))
    answer = etcd.obey(one.next_request(Now(0)))
    one.answer(answer, Now(5))
    ask(one, etcd, 15)
    assert one.leader is None
    ask(one, etcd, 15.3)
    assert one.leader is not None


def test_a_record_that_changes_is_not_claimed(etcd):
    put_record(etcd)
    one = candidate(etcd)
    for second in range(1, 60, 9):
        put_record(etcd, n=second)
        ask(one, etcd, second)
    assert one.leader is None and one.seen_at == 55


def test_the_claim_fails_when_the_record_has_changed_since(etcd):
    put_record(etcd)
    one = candidate(etcd)
    look = one.next_request(Now(11))
    one.answer(etcd.obey(look), Now(11))
    claim = one.next_request(Now(11))
    put_record(etcd, n=2)
    one.answer(etcd.obey(claim), Now(11.1))
    assert one.leader is None and one.record.n == 2 and one.seen_at == 11.1
    ask(one, etcd, 21)
    assert one.leader is None
    ask(one, etcd, 22)
    assert one.leader is not None


def test_a_free_record_is_claimed_at_once(etcd):
    put_record(etcd, term="", n=0, epoch=4)
    one = candidate(etcd)
    assert one.leader is not None and record_in(etcd).epoch == 4


def test_a_new_cluster_is_claimed_and_marked(etcd):
    one = candidate(etcd)
    assert one.leader is None and etcd.keys == {}
    ask(one, etcd, 0.2)
    assert one.leader is not None
    assert etcd.text(MARK) == one.quorum.cluster.mark and len(etcd.text(MARK)) == 16


def test_two_claim_a_new_cluster(etcd):
    claims = []
    for name in "ab":
        one = candidate(etcd, name=name)
        one.answer(etcd.obey(one.next_request(Now(0.2))), Now(0.2))
        claims.append((one, one.next_request(Now(0.2))))
    for one, claim in claims:
        one.answer(etcd.obey(claim), Now(0.3))
    assert claims[0][0].leader is not None and claims[1][0].leader is None
    assert claims[1][0].record.daemon == "a" * 16


def test_without_a_record_nobody_claims_what_is_there(etcd):
    etcd.change([(PREFIX + "h/1", "held"), (MARK, "m")])
    one = candidate(etcd)
    for second in range(1, 60):
        ask(one, etcd, second)
    assert one.leader is None and "--etcd-new-cluster" in one.trouble


def test_who_cannot_claim_since_the_mark_was_removed_says_so(etcd):
    etcd.change([(PREFIX + "h/1", "held"), (MARK, "m")])
    one = candidate(etcd, cluster=flomd.Cluster(mark="m"))
    assert one._looks_for_any
    etcd.change([(PREFIX + "h/1", None), (MARK, None)])
    for second in range(1, 5):
        ask(one, etcd, second)
    assert one.leader is None and "lost the mark" in one.trouble


def test_a_leader_whose_record_was_removed_says_so(etcd):
    one = leader(etcd)
    etcd.change([(LEADER, None)])
    ask(one, etcd, 3)
    assert one.end_reason == "somebody has removed the leader record: no longer serving"


@pytest.mark.parametrize("text", [None, "another"])
def test_a_leader_of_another_cluster_does_not_go_on(etcd, text):
    """As when etcd was put back to what another quorum had there."""
    one = leader(etcd)
    etcd.change([(MARK, text)])
    ask(one, etcd, 3)
    assert one.end_reason == ("somebody has removed or changed the mark of this cluster: "
                              "no longer serving")


def test_told_that_it_is_new_it_waits_for_whoever_led(etcd):
    etcd.change([(PREFIX + "h/1", "held"), (MARK, "m")])
    one = candidate(etcd, cluster=flomd.Cluster(is_new=True))
    for second in range(1, 11):
        ask(one, etcd, second)
    assert one.leader is None
    for second in range(11, 14):
        ask(one, etcd, second)
    assert one.leader is not None and etcd.text(MARK) == "m"


def test_a_late_copy_of_the_first_claim_claims_nothing(etcd):
    """Somebody has removed the record; the mark is still there."""
    one = candidate(etcd)
    one.answer(etcd.obey(one.next_request(Now(0.2))), Now(0.2))
    claim = one.next_request(Now(0.2))
    etcd.obey(claim)
    etcd.change([(LEADER, None)])
    etcd.obey(claim)
    assert LEADER not in etcd.keys


def test_a_claim_is_for_the_cluster_that_was_seen(etcd):
    one, claim = claiming(etcd)
    etcd.keys[MARK] = ("another", 1, 1)
    assert not etcd.obey(claim).succeeded


@pytest.mark.parametrize("text, why", [('{"v":2}', "newer layout"), ("{", "damaged")])
def test_a_strange_record_is_not_claimed(etcd, text, why):
    etcd.change([(LEADER, text), (MARK, "m")])
    one = candidate(etcd)
    for second in range(1, 60):
        ask(one, etcd, second)
        assert why in one.trouble
    assert one.leader is None
    put_record(etcd)
    ask(one, etcd, 61)
    assert one.trouble == "" and one.record is not None


# What becomes of a request

def claiming(etcd):
    put_record(etcd, term="")
    one = flomd.Candidate(quorum(), Now(0))
    one.answer(etcd.obey(one.next_request(Now(0))), Now(0))
    return one, one.next_request(Now(0))


def test_a_request_of_unknown_outcome_is_sent_to_the_next_member(etcd):
    one, claim = claiming(etcd)
    members = one.quorum.members
    for number, again in enumerate((1, 2, 3.5), 1):
        assert members.current == f"u{number}"
        one.answer(UNKNOWN, Now(number))
        if number == 3:  # each was asked in vain
            assert one.next_date() == 3.5 and one.next_request(Now(3.4)) is None
        assert one.next_request(Now(again)) is claim


def test_a_request_that_was_refused_is_sent_again_after_a_pause(etcd):
    one, claim = claiming(etcd)
    one.answer(NOT_DONE, Now(1))
    assert one.next_date() == 1.5 and one.next_request(Now(1.4)) is None
    assert one.next_request(Now(1.5)) is claim and one.quorum.members.current == "u1"


@pytest.mark.parametrize("refused, again", [(UNKNOWN, 1), (NOT_DONE, 1.5)])
def test_an_earlier_copy_was_done(etcd, refused, again):
    """Also one that was refused: the transaction that reaches the quota of etcd may be done."""
    one, claim = claiming(etcd)
    etcd.obey(claim)
    one.answer(refused, Now(1))
    one.answer(etcd.obey(one.next_request(Now(again))), Now(2))
    assert one.leader is not None
    assert one.leader.deadline == 9 and one.leader.claimed_at == 2  # the first copy counts


def test_a_claim_without_an_answer_is_given_up(etcd):
    one, claim = claiming(etcd)
    assert one.next_date() == 9
    assert one.look(Now(8.9)) and not one.look(Now(9)) and one.end_reason
    etcd.obey(claim)
    assert one.answer(etcd.obey(claim), Now(9)) == [] and one.leader is None


def test_a_member_that_does_not_answer_is_left():
    members = flomd.Members(["u1", "u2"])
    assert not members.turn() and members.current == "u2"
    assert members.turn() and members.current == "u1"
    members.answered()
    assert not members.turn()


def test_a_member_of_another_cluster_is_asked_no_more():
    members = flomd.Members(["u1", "u2", "u3"])
    members.refuse()
    members.turn()
    assert [members.current, members.turn(), members.current] == ["u2", True, "u3"]
    members.turn()
    assert members.current == "u2"


# The chain

def written(etcd, changes=(), **other):
    """A leader that has written, and its transaction on the way."""
    one = leader(etcd, **other)
    one.write(changes, "told")
    return one, one.next_request(Now(1))


def test_a_transaction_is_guarded_by_the_record_before(etcd):
    one, transaction = written(etcd, [("h/1", "x")])
    before = etcd.text(LEADER)
    assert transaction.guards == (flomd.Guard(LEADER, flomd.VALUE, before),
                                  flomd.Guard(MARK, flomd.VALUE, etcd.text(MARK)))
    (key, text), change = transaction.changes
    assert key == LEADER and change == (PREFIX + "h/1", "x")
    after = flomd.record_of(text)
    assert after.n == flomd.record_of(before).n + 1 and after.epoch == 7
    assert after.x != flomd.record_of(before).x and after.term == flomd.record_of(before).term
    assert one.answer(etcd.obey(transaction), Now(1.1)) == ["told"]
    assert etcd.memory() == {"h/1": "x"} and etcd.text(LEADER) == text


def test_between_two_records_one_content_only(etcd):
    one, transaction = written(etcd, [("h/1", "x")])
    one.write([("h/1", None), ("h/2", "y")], "second")
    one.answer(UNKNOWN, Now(2))
    assert one.next_request(Now(2)) is transaction
    assert one.answer(etcd.obey(transaction), Now(3)) == ["told"]
    assert ask(one, etcd, 3) == ["second"]
    assert etcd.memory() == {"h/2": "y"}


def test_a_late_copy_changes_nothing(etcd):
    one, transaction = written(etcd, [("h/1", "x")])
    one.answer(etcd.obey(transaction), Now(1))
    one.write([("h/1", None)], "ended")
    assert ask(one, etcd, 2) == ["ended"]
    assert not etcd.obey(transaction).succeeded and etcd.memory() == {}


def test_a_copy_that_was_done_counts_as_of_the_first(etcd):
    one, transaction = written(etcd)
    etcd.obey(transaction)
    one.answer(UNKNOWN, Now(6))
    assert one.answer(etcd.obey(one.next_request(Now(6))), Now(7)) == ["told"]
    assert one.deadline == 10


@pytest.mark.parametrize("fields", [dict(n=5), dict(term="", n=0)])
def test_another_record_deposes(etcd, fields):
    one, transaction = written(etcd, [("h/1", "x")])
    put_record(etcd, **fields)
    assert one.answer(etcd.obey(transaction), Now(2)) == []
    assert one.end_reason == "another daemon leads: no longer serving"
    assert one.next_date() == flomd.NEVER
    assert one.next_request(Now(3)) is None and etcd.memory() == {}


def test_no_record_deposes(etcd):
    one, transaction = written(etcd)
    etcd.change([(LEADER, None)])
    one.answer(etcd.obey(transaction), Now(2))
    assert one.end_reason


def test_a_twin_of_the_leader_deposes_it(etcd):
    """As of a virtual machine that was started again from a picture: same term, same number."""
    one, transaction = written(etcd, [("h/1", "x")])
    twin = flomd.record_of(transaction.changes[0][1])._replace(x="another")
    etcd.change([(LEADER, flomd.text_of(twin))])
    assert one.answer(etcd.obey(transaction), Now(2)) == [] and one.end_reason


# The deadline

def test_the_deadline_is_the_handing_over_and_a_ttl_less_a_tenth(etcd):
    one, transaction = written(etcd)
    assert one.deadline == pytest.approx(9.2)
    one.answer(etcd.obey(transaction), Now(4))
    assert one.deadline == 10 and one.look(Now(9.9)) and not one.look(Now(10))
    assert one.end_reason == "lost etcd for 9 s: no longer serving, another daemon takes over"
    assert not one.look(Now(0))  # for ever


def test_how_long_nothing_was_answered(etcd):
    one, transaction = written(etcd)
    one.answer(UNKNOWN, Now(2))
    one.next_request(Now(2))
    assert one.unanswered_for(Now(3)) == 2
    one.answer(etcd.obey(transaction), Now(3))
    assert one.unanswered_for(Now(4)) == 0


def test_the_loop_wakes_at_the_deadline(etcd):
    one, _ = written(etcd)
    assert one.next_date() == one.deadline


@pytest.mark.parametrize("jump, goes_on", [(0.9, True), (-0.9, True), (1.1, False), (-1.1, False)])
def test_a_jump_of_the_wall_clock_ends_the_term(etcd, jump, goes_on):
    """Where no clock of the system counts sleep."""
    one = leader(etcd)
    now = Now(1)
    one.look(now)
    assert one.look(Now(2, now.wall + 1 + jump)) == goes_on


def test_a_clock_that_is_slewed_ends_nothing(etcd):
    one = leader(etcd)
    for number in range(1, 80):
        boot = number / 10
        assert one.look(Now(boot, 1e9 + 3 * boot))


def test_it_beats_every_fifth_of_the_ttl(etcd):
    one = leader(etcd)
    assert one.next_date() == pytest.approx(2.2)
    assert one.next_request(Now(2.1)) is None
    first = record_in(etcd).n
    ask(one, etcd, 2.3)
    assert record_in(etcd).n == first + 1 and one.deadline == pytest.approx(11.3)
    assert one.next_date() == pytest.approx(4.3)


# Batches

def keys_of(transaction):
    return [key[len(PREFIX):] for key, _ in transaction.changes[1:]]


def test_a_key_keeps_its_place(etcd):
    one, _ = written(etcd)
    one.write([("r/a", "1"), ("h/1", "x")], 1)
    one.write([("h/2", "x"), ("r/a", "2")], 2)
    one.answer(etcd.obey(one._request), Now(1))
    assert keys_of(one.next_request(Now(1))) == ["r/a", "h/1", "h/2"]


def test_the_order_of_a_batch(etcd):
    """Half of it may lose a number, and not have it twice."""
    before = [("v/a/1", "x"), ("h/1", "x"), ("r/b", "x")]
    one = leader(etcd)
    one.write(before, 1)
    ask(one, etcd, 1)
    one.write([("r/b", None), ("h/2", "y"), ("v/a/2", "y"), ("r/a", "y"), ("h/1", None),
               ("v/a/1", None), ("d", "y")], 2)
    assert keys_of(one.next_request(Now(1))) == ["h/1", "v/a/1", "r/a", "h/2", "v/a/2", "r/b"]


def test_what_was_never_sent_is_not_removed(etcd):
    one, _ = written(etcd)
    one.write([("h/1", "x"), ("h/2", "x")], 1)
    one.write([("h/1", None), ("h/9", None)], 2)
    one.answer(etcd.obey(one._request), Now(1))
    transaction = one.next_request(Now(1))
    assert keys_of(transaction) == ["h/2"]
    assert one.answer(etcd.obey(transaction), Now(1)) == [1, 2]


def test_what_was_removed_is_as_if_it_was_never_sent(etcd):
    one = leader(etcd)
    for text in ("x", None):
        one.write([("h/1", text)], text)
        ask(one, etcd, 1)
    one.write([("h/1", "y")], 1)
    one.write([("h/1", None)], 2)
    transaction = one.next_request(Now(1))
    assert keys_of(transaction) == []
    assert one.answer(etcd.obey(transaction), Now(1)) == [1, 2]


def test_what_is_on_its_way_is_removed(etcd):
    one, transaction = written(etcd, [("h/1", "x")])
    one.write([("h/1", None)], 2)
    one.answer(etcd.obey(transaction), Now(1))
    ask(one, etcd, 1)
    assert etcd.memory() == {}


def test_what_was_loaded_is_removed(etcd):
    put_record(etcd, term="")
    etcd.change([(PREFIX + "h/1", "x")])
    one = leader(etcd)
    one.write([("h/1", None)], 1)
    ask(one, etcd, 1)
    assert etcd.memory() == {}


def test_a_transaction_is_cut(etcd):
    one = leader(etcd)
    for number in range(150):
        one.write([(f"h/{number:03}", "x")], number)
    first = one.next_request(Now(1))
    assert len(first.changes) == 121  # with the record; etcd takes 128
    assert one.answer(etcd.obey(first), Now(1)) == list(range(120))
    assert ask(one, etcd, 1) == list(range(120, 150))


def test_a_transaction_is_cut_by_its_size(etcd):
    one = leader(etcd)
    text = "é" * 50000  # 100 000 bytes
    one.write([(f"h/{number}", text) for number in range(5)], "all")
    sizes = []
    for _ in range(3):
        transaction = one.next_request(Now(1))
        sizes.append(len(transaction.changes) - 1)
        told = one.answer(etcd.obey(transaction), Now(1))
        assert (told == ["all"]) == (len(sizes) == 3)  # with its last change
    assert sizes == [2, 2, 1]


def test_what_is_larger_than_that_goes_alone(etcd):
    one = leader(etcd)
    one.write([("h/1", "x" * 300000), ("h/2", "y")], 1)
    assert keys_of(one.next_request(Now(1))) == ["h/1"]


# Pings, and other things that change nothing

def test_a_ping_waits_for_what_is_handed_over_later(etcd):
    """Not for what was on its way when it came."""
    one, transaction = written(etcd)
    one.ping("pong", Now(2))
    assert one.answer(etcd.obey(transaction), Now(3)) == ["told"]
    assert ask(one, etcd, 3) == ["pong"]


def test_pings_share_a_beat(etcd):
    one = leader(etcd)
    before = record_in(etcd).n
    one.ping(1, Now(1))
    assert ask(one, etcd, 1) == [] and one.next_date() == 1.5
    one.ping(2, Now(1.4))
    assert ask(one, etcd, 1.5) == [1, 2] and record_in(etcd).n == before + 1


def test_a_ping_goes_with_what_is_written(etcd):
    one = leader(etcd)
    one.ping("pong", Now(1))
    one.write([("h/1", "x")], "told")
    assert ask(one, etcd, 1.1) == ["told", "pong"]
    one.write((), "second")
    assert ask(one, etcd, 1.2) == ["second"]


def test_a_reclaim_without_changes_is_told_at_once_but_not_before(etcd):
    one, transaction = written(etcd, [("h/1", "x")])
    one.write((), "held again")
    assert one.answer(etcd.obey(transaction), Now(2)) == ["told"]
    assert ask(one, etcd, 2) == ["held again"]


# The start and the end of a term

def test_the_memory_is_loaded_page_by_page(etcd):
    put_record(etcd, term="", epoch=3)
    changes = [(f"{PREFIX}h/{number:05}", "x") for number in range(4500)]
    changes += [(PREFIX + "other", "x"), (PREFIX + "v/a/1", "y"), ("/flom/tesu/h/1", "z")]
    etcd.change(changes)
    one = candidate(etcd).leader
    pages = 0
    while not one.is_loaded() and pages < 9:
        request = one.next_request(Now(1))
        one.answer(etcd.obey(request), Now(1))
        pages += 1
    assert pages == 3 and len(one.loaded) == 4501 and one.loaded[-1] == ("v/a/1", "y")


def test_it_beats_between_two_pages(etcd):
    put_record(etcd, term="")
    etcd.change([(f"{PREFIX}h/{number:05}", "x") for number in range(4500)])
    one = candidate(etcd).leader
    kinds = []
    for second in (1, 2.5, 2.6, 5, 5.1):
        request = one.next_request(Now(second))
        kinds.append(type(request).__name__)
        one.answer(etcd.obey(request), Now(second))
    assert kinds == ["Range", "Transaction", "Range", "Transaction", "Range"] and one.is_loaded()


def test_a_page_that_is_not_answered_keeps_nothing_back(etcd):
    """Neither the beat nor the orderly end; it is asked for again behind them."""
    put_record(etcd, term="")
    etcd.change([(f"{PREFIX}h/1", "x")])
    one = candidate(etcd).leader
    kinds = []
    for second in (1, 1.9, 2.5, 2.6, 3.5):
        request = one.next_request(Now(second))
        kinds.append(type(request).__name__)
        answer = flomd.failure(flomd.UNKNOWN)
        if isinstance(request, flomd.Transaction):
            answer = etcd.obey(request)
        one.answer(answer, Now(second))
    assert kinds == ["Range", "Range", "Range", "Transaction", "Range"] and not one.is_loaded()
    one.next_request(Now(4))
    one.resign()
    one.answer(flomd.failure(flomd.UNKNOWN), Now(4.1))
    one.answer(etcd.obey(one.next_request(Now(4.1))), Now(4.2))
    assert one.end_reason and flomd.record_of(etcd.text(LEADER)).term == ""


def test_the_orderly_end(etcd):
    """What was gathered is stored, the record is free, and the next one claims at once."""
    one, transaction = written(etcd, [("h/1", "x")])
    other = candidate(etcd, 1, "b")
    one.write([("h/2", "y")], "second")
    one.ping("pong", Now(1))
    one.resign()
    one.ping("late pong", Now(1))
    assert one.answer(etcd.obey(transaction), Now(1)) == ["told"]
    assert ask(one, etcd, 1) == ["second"] and one.end_reason == "it has resigned"
    assert flomd.is_free(record_in(etcd)) and record_in(etcd).epoch == 7
    assert etcd.memory() == {"h/1": "x", "h/2": "y"}
    ask(other, etcd, 1.2)
    assert other.leader is not None


def test_nothing_is_stored_after_the_end(etcd):
    """The connections are closed; their holders are those of the next leader."""
    one, transaction = written(etcd, [("h/1", "x")])
    one.resign()
    one.write([("h/1", None)], "too late")
    assert one.answer(etcd.obey(transaction), Now(1)) == ["told"]
    assert ask(one, etcd, 1) == [] and etcd.memory() == {"h/1": "x"}


def test_the_last_transaction_of_many(etcd):
    one = leader(etcd)
    for number in range(150):
        one.write([(f"h/{number:03}", "x")], number)
    one.resign()
    one.answer(etcd.obey(one.next_request(Now(1))), Now(1))
    assert not flomd.is_free(record_in(etcd))
    ask(one, etcd, 1)
    assert flomd.is_free(record_in(etcd)) and len(etcd.memory()) == 150


# The same cluster?

KNOWN = dict(id=CLUSTER, mark="m", revision=5)


@pytest.mark.parametrize("known, why", [
    (dict(id=STRANGER), "another cluster"), (dict(revision=99), "lost what it knew"),
    (dict(mark="n"), "the mark m in place of n")])
def test_a_strange_cluster_is_not_claimed(etcd, known, why):
    put_record(etcd, term="")
    etcd.revision = 10
    one = candidate(etcd, cluster=flomd.Cluster(**dict(KNOWN, **known)))
    for second in range(1, 30):
        ask(one, etcd, second)
    assert one.leader is None and why in one.trouble
    new = flomd.Cluster(is_new=True, **dict(KNOWN, **known))
    one = candidate(etcd, cluster=new)
    assert one.leader is not None and not new.is_new


@pytest.mark.parametrize("changes", [[], [(LEADER, flomd.text_of(own_record()))]])
def test_a_cluster_that_has_lost_its_mark_is_not_claimed(etcd, changes):
    etcd.change(changes)
    etcd.revision = 10
    one = candidate(etcd, cluster=flomd.Cluster(**KNOWN))
    for second in range(1, 30):
        ask(one, etcd, second)
    assert one.leader is None and "lost the mark" in one.trouble


def test_a_record_without_a_mark_is_strange_to_whoever_knows_nothing(etcd):
    etcd.change([(LEADER, flomd.text_of(own_record()))])
    one = candidate(etcd)
    assert one.leader is None and "lost the mark" in one.trouble


@pytest.mark.parametrize("change", [dict(cluster=STRANGER), dict(revision=1)])
def test_an_answer_of_another_cluster_deposes(etcd, change):
    etcd.revision = 10
    one, transaction = written(etcd)
    answer = etcd.obey(transaction)._replace(**change)
    assert one.answer(answer, Now(2)) == [] and "no longer serving" in one.end_reason


def test_a_claim_goes_on_at_the_other_members(etcd):
    one, claim = claiming(etcd)
    one.answer(etcd.obey(claim)._replace(cluster=STRANGER), Now(1))
    assert one.trouble and one.quorum.members.current == "u2"
    assert one.next_request(Now(1)) is claim
    one.answer(etcd.obey(claim), Now(1))
    assert one.leader is not None


# Schedules that chance does not find

def test_a_leader_that_was_stopped_says_nothing(etcd):
    """Another one leads since 9 s.  It looks at its deadline before it reads what has come: the
    answer to its last transaction, and pings."""
    one, transaction = written(etcd, [("h/1", "x")])
    answer = etcd.obey(transaction)
    other = candidate(etcd, 1, "b")
    ask(other, etcd, 11.2)
    assert other.leader is not None
    assert not one.look(Now(20))
    assert one.answer(answer, Now(20)) == []
    one.ping("pong", Now(20))
    assert one.next_request(Now(20)) is None


def test_the_answer_to_the_wrong_ping(etcd):
    """The leader is stopped between the handing over and the answer.  A ping that came meanwhile,
    when another already led, is not answered by what was done before."""
    one, transaction = written(etcd)
    answer = etcd.obey(transaction)
    other = candidate(etcd, 1, "b")
    ask(other, etcd, 11.2)
    one.ping("pong", Now(1))  # by a clock that stood
    assert one.answer(answer, Now(1)) == ["told"]
    assert ask(one, etcd, 1.6) == [] and one.end_reason == "another daemon leads: no longer serving"


def test_a_paused_machine_does_not_know_it(etcd):
    """Its clocks stand for 20 s, so neither the deadline nor the age of its record tell it."""
    one = leader(etcd)
    other = candidate(etcd, 1, "b")
    ask(other, etcd, 20)
    assert other.leader is not None
    now = Now(0.3)
    assert one.look(now)
    one.ping("pong", now)
    one.write((), "held again")
    one.write([("h/1", "x")], "granted")
    assert ask(one, etcd, 0.3) == [] and one.end_reason and etcd.memory() == {}


def test_a_grant_that_is_confirmed_late_is_known(etcd):
    """It is stored before the claim, so it is loaded after it, and told by nobody."""
    one, transaction = written(etcd, [("h/1", "x")])
    other = candidate(etcd, 1, "b")
    etcd.obey(transaction)
    ask(other, etcd, 2)
    ask(other, etcd, 12.1)
    ask(other.leader, etcd, 12.1)
    assert other.leader.loaded == [("h/1", "x")]
    assert not one.look(Now(12.2)) and one.answer(etcd.obey(transaction), Now(12.2)) == []


def test_digits_are_asked_for_by_their_number(etcd):
    asked = []

    class Asked(Digits):
        def __call__(self, number):
            asked.append(number)
            return super().__call__(number)

    leader(etcd, digits=Asked("a"))
    assert asked == [16, 8, 16]  # the term, x, and the mark
