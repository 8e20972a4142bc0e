"""Members of collections: the statements that add, complete, label and remove them inside of a transaction.

A member is an image, its vector and its labels. `requests.py` adds it with the request that computes its vector;
`transition.py` completes it in the transaction in which that request is answered; `requests.py` removes it when the
request is deleted. So whatever is acknowledged about a request is also true of its collections.

    collection_members    an image of a collection, once; without a sequence while it has no vector
    collection_vectors    its vector: these rows are the truth, `vector_cache.py` follows them
    collection_changes    the vectors that were added and removed, in the order of the commits; what was removed later
                          has no vector any more
    collection_labels     given by the client, or the most likely label of each classifier under the classifier's name

`requests.collections` counts in how many collections a request is a member with a vector; retention skips it then.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from provider_image.services.embedding import VECTOR, read_vector
from store.database import Transaction
from store.errors import LimitReached
from store.files import files_from_text
from store.states import RequestState

log = logging.getLogger(__name__)

#: Earlier answers to the same image in which a classification is looked for.
_MAX_ANSWERS = 100
#: Labels of one member; further ones are not added.
MAX_LABELS = 64
#: Collections of one key that an image may be in: all get its vector in the commit that has the answer.
MAX_COLLECTIONS_OF_IMAGE = 16
#: How much the length of a vector may differ from 1.
_LENGTH_TOLERANCE = 1e-3

# An image whose request has ended without a vector takes the new one. A request that waits keeps it: the new one may
# be part of a batch that is not accepted in the end. The collection may have been deleted meanwhile.
_ADD = f"""
    INSERT INTO collection_members (collection, request_number, image_sha256)
    SELECT number, ?, ? FROM collections WHERE number = ? AND deleted_at IS NULL
    ON CONFLICT (image_sha256, collection) DO UPDATE SET request_number = excluded.request_number, reason = NULL
    WHERE sequence IS NULL AND NOT EXISTS (
        SELECT 1 FROM requests WHERE number = collection_members.request_number
        AND state IN ('{RequestState.QUEUED}', '{RequestState.CLAIMED}'))
"""

_COUNT_COLLECTIONS = """
    SELECT count(*) FROM collection_members JOIN collections ON collections.number = collection
    WHERE image_sha256 = ? AND key_id IS (SELECT key_id FROM collections WHERE number = ?)
"""

_MEMBER_OF_IMAGE = "SELECT number FROM collection_members WHERE image_sha256 = ? AND collection = ?"

_COUNT_LABELS = "SELECT count(*) FROM collection_labels WHERE number = ?"

_TO_COMPLETE = """
    SELECT collection_members.number, request_number, collection, files, requests.digest AS digest,
           collections.digest AS expected, dimensions, requests.model = collections.model AS is_its_model
    FROM json_each(?)
    JOIN collection_members ON request_number = json_each.value
    JOIN collections ON collections.number = collection
    JOIN requests ON requests.number = request_number
    WHERE collection_members.sequence IS NULL AND requests.state = 'done' ORDER BY collection_members.number
"""

_NEXT_SEQUENCE = "UPDATE collections SET sequence = sequence + 1 WHERE number = ? RETURNING sequence"

_SET_VECTOR_FACTS = "UPDATE collections SET digest = ?, dimensions = ? WHERE number = ?"

_ADD_VECTOR = "INSERT INTO collection_vectors (number, vector) VALUES (?, ?)"

_ADD_CHANGE = "INSERT INTO collection_changes (collection, sequence, number) VALUES (?, ?, ?)"

_COMPLETE = "UPDATE collection_members SET sequence = ?, reason = NULL WHERE number = ?"

_REFUSE = "UPDATE collection_members SET reason = ? WHERE number = ?"

_COUNT_MEMBERSHIP = "UPDATE requests SET collections = collections + ? WHERE number = ?"

# The members whose image a request has classified, and those whose image was classified before.
_CLASSIFIED_NOW = """
    SELECT collection_members.number, collection, requests.model AS model, output
    FROM json_each(?)
    JOIN requests ON requests.number = json_each.value AND requests.service = 'classification'
    JOIN collection_members ON collection_members.image_sha256 = requests.image_sha256
    JOIN collections ON collections.number = collection
    WHERE collection_members.sequence IS NOT NULL AND collections.key_id IS requests.key_id
"""

_CLASSIFIED_BEFORE = f"""
    SELECT model, output FROM (
        SELECT earlier.* FROM collection_members
        JOIN requests AS own ON own.number = request_number
        JOIN requests AS earlier INDEXED BY requests_answer
          ON earlier.image_sha256 = own.image_sha256 AND earlier.state = 'done'
        WHERE collection_members.number = ? AND earlier.key_id IS own.key_id LIMIT {_MAX_ANSWERS})
    WHERE service = 'classification' ORDER BY number
"""

_FORGET_LABEL = "DELETE FROM collection_labels WHERE number = ? AND name = ?"

_ADD_LABEL = "INSERT INTO collection_labels (collection, value, name, number) VALUES (?, ?, ?, ?)"

_OF_REQUESTS = """
    SELECT collection_members.number, collection, request_number, sequence
    FROM json_each(?) JOIN collection_members ON request_number = json_each.value
"""

_FORGET_CHANGE = "DELETE FROM collection_changes WHERE collection = ? AND sequence = ?"

#: Its vector and labels go with it by their foreign keys.
_REMOVE = "DELETE FROM collection_members WHERE number = ?"


class TooManyCollections(LimitReached):
    """This API key has as many collections as it may. Delete one first."""


class NewMember(NamedTuple):
    """An image that is about to become a member."""

    #: Number of the collection.
    collection: int
    #: Number of the request that computes its vector.
    request_number: int
    image_sha256: str
    #: Given by the client.
    labels: Mapping[str, str]


def add_members(transaction: Transaction, members: Sequence[NewMember]) -> None:
    """Add members without a vector. An image that is a member already only gets the labels.

    :raises TooManyCollections: of this image.
    """
    transaction.execute_many(_ADD, [(one.request_number, one.image_sha256, one.collection) for one in members])
    for one in members:
        (count,) = transaction.execute(_COUNT_COLLECTIONS, (one.image_sha256, one.collection)).fetchone()
        if count > MAX_COLLECTIONS_OF_IMAGE:
            raise TooManyCollections(
                f"An image can be in {MAX_COLLECTIONS_OF_IMAGE} collections. One of these is in as many already."
            )
        if one.labels:
            found = transaction.execute(_MEMBER_OF_IMAGE, (one.image_sha256, one.collection)).fetchall()
            for (number,), (name, value) in itertools.product(found, one.labels.items()):
                _set_label(transaction, number, one.collection, name, value)


def complete_members(transaction: Transaction, requests: Sequence[int]) -> None:
    """Give members the vectors of their requests that were answered, and the labels that their images have.

    A member whose vector cannot be compared with the others of its collection keeps the reason and gets none.

    :param requests: numbers.
    """
    facts: dict[int, tuple[str, int]] = {}
    for row in transaction.execute(_TO_COMPLETE, (json.dumps(requests),)).fetchall():
        number, collection = row["number"], row["collection"]
        digest, dimensions = facts.get(collection, (row["expected"], row["dimensions"]))
        vector = _read_vector(transaction, row)
        reason = None
        if not row["is_its_model"] or vector is None:
            reason = "Its request did not return a vector of the collection's model."
        elif digest is not None and digest != row["digest"]:
            reason = "The model was installed anew since, so its vectors cannot be compared with the earlier ones."
        elif dimensions is not None and dimensions != len(vector) // 4:
            reason = f"Its vector has {len(vector) // 4} values, the others have {dimensions}."
        if reason is not None:
            transaction.execute(_REFUSE, (reason, number))
            continue
        assert vector is not None
        if digest is None or dimensions is None:
            facts[collection] = (row["digest"], len(vector) // 4)
            transaction.execute(_SET_VECTOR_FACTS, (*facts[collection], collection))
        (sequence,) = transaction.execute(_NEXT_SEQUENCE, (collection,)).fetchone()
        transaction.execute(_ADD_VECTOR, (number, vector))
        transaction.execute(_ADD_CHANGE, (collection, sequence, number))
        transaction.execute(_COMPLETE, (sequence, number))
        transaction.execute(_COUNT_MEMBERSHIP, (1, row["request_number"]))
        for earlier in transaction.execute(_CLASSIFIED_BEFORE, (number,)).fetchall():
            _set_top_label(transaction, number, collection, earlier)


def _read_vector(transaction: Transaction, row: Any) -> bytes | None:
    """Read the vector of an answer; None if it has none of unit length."""
    file = files_from_text(row["files"]).get(VECTOR)
    if file is None or file.size_bytes % 4:
        return None
    try:
        vector = transaction.read_file(file.sha256)
    except FileNotFoundError:
        log.error("the file of a vector is missing", extra={"sha256": file.sha256})
        return None
    # The length is not finite if a value is not.
    return vector if abs(math.hypot(*read_vector(vector)) - 1) <= _LENGTH_TOLERANCE else None


def label_members(transaction: Transaction, requests: Sequence[int]) -> None:
    """Give the members whose images were classified by some requests the most likely labels."""
    for row in transaction.execute(_CLASSIFIED_NOW, (json.dumps(requests),)).fetchall():
        _set_top_label(transaction, row["number"], row["collection"], row)


def _set_top_label(transaction: Transaction, number: int, collection: int, classified: Any) -> None:
    output = json.loads(classified["output"])
    try:
        label = str(output[0][1])
    except (IndexError, KeyError, TypeError):
        return  # of a service of another package with this name
    _set_label(transaction, number, collection, classified["model"], label)


def _set_label(transaction: Transaction, number: int, collection: int, name: str, value: str) -> None:
    """Give a member a label in place of the one that it has under the name."""
    transaction.execute(_FORGET_LABEL, (number, name))
    if transaction.execute(_COUNT_LABELS, (number,)).fetchone()[0] < MAX_LABELS:
        transaction.execute(_ADD_LABEL, (collection, value, name, number))


def remove_members_of(transaction: Transaction, requests: Sequence[int]) -> None:
    """Remove the members that have the vectors of some requests, from all collections."""
    remove_members(transaction, transaction.execute(_OF_REQUESTS, (json.dumps(requests),)).fetchall())


def remove_members(transaction: Transaction, rows: Iterable[Any]) -> int:
    """Remove members with their vectors and labels. :param rows: of the table. :return: how many."""
    memberships: Counter[int] = Counter()
    by_collection: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        by_collection[row["collection"]].append(row)
    for collection, members in by_collection.items():
        for row in members:
            if row["sequence"] is not None:
                (sequence,) = transaction.execute(_NEXT_SEQUENCE, (collection,)).fetchone()
                transaction.execute(_FORGET_CHANGE, (collection, row["sequence"]))
                transaction.execute(_ADD_CHANGE, (collection, sequence, row["number"]))
                memberships[row["request_number"]] += 1
        transaction.execute_many(_REMOVE, [(row["number"],) for row in members])
    transaction.execute_many(_COUNT_MEMBERSHIP, [(-count, number) for number, count in memberships.items()])
    return sum(map(len, by_collection.values()))
