# SPDX-License-Identifier: Apache-2.0
"""Tables of papers, each cell a command. See docs/results/papers.md."""
