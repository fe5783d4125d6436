"""The study of the certificate: exact errors against dense matrices, and a small run."""

import json
import types

import numpy as np
import pytest

import kipcore
from experiments.docs import tables
from experiments.studies import certificate
from kipcore.selection import certificate as library

N = 60


@pytest.fixture(scope="module")
def problem():
  return certificate.problem_of("friedman", N)


def test_the_exact_error_is_an_eigenvalue_and_at_least_that_of_queries(problem):
  sample = kipcore.sensitivity_sample(0, problem.scores, 50)
  counts = np.bincount(sample.indices, weights=np.asarray(sample.weights, float), minlength=N)
  change = problem.whitened.T @ ((counts - 1)[:, None] * problem.whitened)
  found = certificate.exact_epsilon(problem, counts)
  np.testing.assert_allclose(found, np.abs(np.linalg.eigvalsh(change)).max(), rtol=1e-4)
  queries = np.asarray(library.query_errors(problem.bank, sample.indices, sample.weights))
  assert 0 < queries.max() <= found * (1 + 1e-3)
  assert certificate.excess(problem, counts) > 0


def test_all_rows_have_no_excess(problem):
  assert abs(certificate.excess(problem, np.ones(N))) < 1e-9


def test_slopes_of_a_power_law():
  sizes = np.array([10, 100, 1000])
  np.testing.assert_allclose(certificate.slope(sizes, 3 * sizes[:, None] ** -0.5), -0.5)


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch):
  monkeypatch.setattr(certificate, "SIZES", (100, 6400))
  output = tmp_path / "result.json"
  values = types.SimpleNamespace(output=output, num_rows=N, num_seeds=2)
  monkeypatch.setattr(certificate, "FLAGS", values)
  certificate.main()
  content = json.loads(output.read_text())
  for entry in content["datasets"].values():
    assert len(entry["lower_bounds"]) == 2 and max(entry["lower_bounds"]) < 1 + 1e-5
    cell = entry["samplers"]["krr_sensitivity"]["sizes"]["6400"]
    assert max(cell["errors"]["exact"]) < cell["promised"]["exact"] < 1
  lines = tables.certificate_table(content).splitlines()
  assert lines[2].startswith("| friedman, `krr_sensitivity` | 100 | ") and lines[3].count("100 %")
