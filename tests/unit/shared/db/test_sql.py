import sqlite3
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.db.ids import bucket_of, new_id
from shared.db.migrate import statements_of
from shared.db.sql import to_sqlite, to_sqlite_value


@given(st.integers(0, 4095))
def test_the_bucket_in_sql_is_the_bucket_in_python(bucket):
    made = new_id(bucket)
    connection = sqlite3.connect(":memory:")
    sql = to_sqlite("SELECT tenfold_bucket_of(a.id) FROM (SELECT $1 AS id) AS a")
    assert connection.execute(sql, (made.bytes,)).fetchone() == (bucket_of(made),)
    connection.close()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a = $1 AND b = $12 OR c = $1", "a = ?1 AND b = ?12 OR c = ?1"),
        ("a = '$1 it''s $2' AND b = $2", "a = '$1 it''s $2' AND b = ?2"),
        ("-- $1\nSELECT $1 /* $2 */", "-- $1\nSELECT ?1 /* $2 */"),
        ("SELECT 1 WHERE a = $1 FOR UPDATE", "SELECT 1 WHERE a = ?1 "),
        ("SELECT 1 LIMIT 5 FOR UPDATE SKIP LOCKED ", "SELECT 1 LIMIT 5 "),
        ("SELECT 'FOR UPDATE'", "SELECT 'FOR UPDATE'"),
    ],
)
def test_a_statement_is_read_as_it_was_meant(written, read):
    assert to_sqlite(written) == read


def test_values_are_bound_as_the_file_stores_them():
    made = new_id(3)
    assert to_sqlite_value(made) == made.bytes
    assert to_sqlite_value(True) == 1
    assert [to_sqlite_value(value) for value in (None, 7, "a", b"b")] == [None, 7, "a", b"b"]


@pytest.mark.parametrize("value", [1.5, object(), [UUID(int=0)]])
def test_a_value_outside_the_shared_subset_is_a_bug(value):
    with pytest.raises(TypeError, match="cannot bind"):
        to_sqlite_value(value)


def test_a_script_is_cut_at_its_statements_and_not_inside_triggers():
    script = """
    -- first; still a comment
    CREATE TABLE a (b text DEFAULT ';');
    CREATE TRIGGER t AFTER INSERT ON a BEGIN UPDATE a SET b = 1; DELETE FROM a; END;
    -- the end
    """
    assert len(list(statements_of(script))) == 2
