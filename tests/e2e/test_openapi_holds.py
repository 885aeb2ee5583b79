"""What /openapi.json says of the mesh is what the mesh does, asked in ways nobody thought of."""

from tests.asking import Questions, ask_all
from tests.asking_mesh import known_values
from tests.mesh import Mesh

# 39 operations, each asked as documented and as not; `make chaos` asks more.
EXAMPLES = 3


def test_every_operation_answers_as_documented_and_never_with_a_5xx(mesh: Mesh, sign_in) -> None:
    headers = {"Authorization": f"Bearer {sign_in(mesh)}"}
    asked = ask_all(
        mesh.edge_url,
        Questions(EXAMPLES, headers=lambda: headers, known=known_values(mesh, headers)),
    )
    assert not asked.wrong, "\n\n".join(asked.wrong[:20])
    # Not all of it was turned away at the door.
    assert {200, 400, 404} <= asked.statuses.keys()
