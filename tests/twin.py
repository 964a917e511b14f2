"""Decoding in plain Python: one row, one token after the other, dense numpy tables, from the methods' descriptions.

Nothing of hdlm_jax.decoding is used. `decode` returns the states of a row, the canvas first, one a call.
"""

import math

import numpy as np


class Tree:
    """Symbols of words, clusters, .., mask, numbered in this order; parents fine to coarse, without the mask's."""

    def __init__(self, parents, vocab_size):
        self.anc = [list(range(vocab_size))]
        for parent in [*parents, [0] * (max(parents[-1]) + 1 if parents else vocab_size)]:
            self.anc.append([parent[a] for a in self.anc[-1]])
        self.sizes = [max(a) + 1 for a in self.anc]
        self.K, self.offset = len(self.sizes) - 1, [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        self.mask = self.offset[-1]

    def level(self, symbol):
        return max(k for k, o in enumerate(self.offset) if symbol >= o)

    def words(self, symbol):
        k = self.level(symbol)
        return [x for x, a in enumerate(self.anc[k]) if a == symbol - self.offset[k]]

    def up(self, symbol, k):
        """Ancestor at level k."""
        return self.offset[k] + self.anc[k][self.words(symbol)[0]]

    def mass(self, p, symbol):
        return float(sum(p[x] for x in self.words(symbol)))

    def law(self, p, symbol, k):
        """{symbol of level k: probability} of what a token that shows `symbol` drops to."""
        out = {}
        for x in self.words(symbol):
            out[self.up(x, k)] = out.get(self.up(x, k), 0.0) + p[x]
        total = sum(out.values())
        return {s: v / total for s, v in out.items()}


def top(law):
    return min(law, key=lambda s: (-law[s], s))


def entropy(law):
    return -sum(v * math.log(v) for v in law.values() if v > 0)


def first(score, many):
    """The `many` highest of {position: score}, ties from the left."""
    return sorted(score, key=lambda i: (-score[i], i))[: max(int(many), 0)]


def how_sure(law, kind):
    ordered = [*sorted(law.values(), reverse=True), 0.0]
    return {"top": ordered[0], "margin": ordered[0] - ordered[1], "entropy": -entropy(law)}[kind]


def decode(tree, network, canvas, given, n, *, score="top", quota="even", straight=False, commit="", revise="",
           to="mask", schedule="linear", block=0, depth=3, targets=None):
    """States [calls + 1][S] of one row, all choices of symbols by argmax.

    network: z -> p [S, V]. n: numbers by name. targets: (call, z) -> (levels to drop to, levels to climb to or None) in
    place of score and quota; it says None when it is done.
    """
    size = len(canvas)
    free = [i for i in range(size) if not given[i]]
    number = {i: (free.index(i) // block if block else 0) for i in free}
    tops = {i: tree.level(canvas[i]) for i in free}
    worth = {i: min(tops[i], 1) if straight else tops[i] for i in free}
    z, trail, call, turn, last = list(canvas), [list(canvas)], 0, 0, None
    sure = dict.fromkeys(free, 0.0)
    path = {i: {} for i in free}  # level -> probability of the last drop from it
    past = {i: [] for i in free}  # laws of the calls before, None where one did not count

    def level(i):
        return tree.level(z[i])

    while True:
        left = [i for i in free if level(i) > 0]
        plan = targets(call, z) if targets else None
        if plan is None and (targets or not left):
            return trail
        p = network(z)
        now = min((number[i] for i in left), default=-1)
        here = [i for i in free if number[i] == now]
        open_ = [i for i in here if level(i) > 0]
        turn = turn + 1 if now == last else 0
        last = now
        law = {i: tree.law(p[i], z[i], 0 if straight else level(i) - 1) for i in left}

        # how sure each token is
        drops = sum(worth[i] for i in here)
        if score == "pbar_entropy":
            points = {}
            for i in open_:
                laws = [law[i], *[q for q in past[i] if q is not None]]
                mean = {s: sum(q[s] for q in laws) / len(laws) for s in law[i]}
                points[i] = -entropy(mean)
        elif score in ("eos", "eos_doubling"):
            done = 1 - sum(level(i) for i in free) / sum(tops.values())
            whole = 2 ** max(1, math.ceil(math.log2(drops))) if drops else 1
            share = done if score == "eos" else (2 ** (turn + 1) - 1) / whole
            g = n["eos_least"] + (1 - n["eos_least"]) * share
            ends = [tree.up(n["eos"], k) if k else n["eos"] for k in range(tree.K)]
            points = {i: how_sure(law[i], "top") * (g if top(law[i]) in ends else 1) for i in open_}
        else:
            points = {i: how_sure(law[i], score) for i in open_}

        # which of them drop, and how far
        if plan:
            goal = plan[0]
        else:
            rest = sum(min(level(i), 1) if straight else level(i) for i in here)
            turns = max(1, math.ceil(n["steps"] * drops / max(sum(worth.values()), 1)))
            even = math.ceil(rest / max(turns - turn, 1))
            bar = {i: n["threshold"] if straight or level(i) == 1 else n["threshold_cluster"] for i in open_}
            above = [i for i in open_ if points[i] >= bar[i]]
            far = []
            if quota == "even":
                chosen = first(points, even)
            elif quota == "count":
                chosen = first(points, n["count"])
            elif quota == "all":
                chosen = open_
            elif quota == "above":
                chosen = above
            elif quota == "above_even":
                chosen = above or first(points, even)
            elif quota == "factor":
                ordered = first(points, len(points))
                fits = [m for m in range(1, len(ordered) + 1) if (m + 1) * (1 - points[ordered[m - 1]]) < n["factor"]]
                chosen = ordered[: max(fits, default=0)]
            elif quota == "doubling":
                due = rest if 2 ** (turn + 1) >= drops else min(2**turn, rest)
                chosen = first(points, due)
                due -= len(chosen)
                for i in first(points, len(points)):
                    if due > 0 and level(i) > 1 and not straight:
                        far, due = [*far, i], due - level(i) + 1
            elif quota == "running":
                chosen = []
                for i in open_:
                    k = level(i)
                    kept = [path[j][k] for j in free if level(j) < k <= tops[j]]
                    chosen += [i] if points[i] > (np.mean(kept) if kept else 1.0) else []
                chosen = chosen if len(chosen) >= n["least"] else first(points, n["least"])
            elif quota == "consistent":
                sure_now = first({i: how_sure(law[i], "entropy") for i in open_}, n["confident"])
                chosen = [i for i in sure_now if past[i] and past[i][0] and top(past[i][0]) == top(law[i])]
            chosen = chosen or first(points, 1)
            goal = {i: 0 if straight or i in far else level(i) - 1 for i in chosen}

        # what they become
        before, new = list(z), list(z)
        for i in goal:
            if goal[i] < level(i):
                at = law[i] if straight or goal[i] == level(i) - 1 else tree.law(p[i], z[i], 0)
                new[i], sure[i] = tree.up(top(at), goal[i]), at[top(at)]
        committed = False
        if commit:
            watched = [i for i in left if i >= size - 3] if commit == "last" else open_
            gaps = []
            for i in watched:
                ordered = sorted(law[i].values())[::-1]
                gaps.append(min(math.log(ordered[0] / ordered[1]), 1e3) if len(ordered) > 1 and ordered[1] > 0 else 1e3)
            done = 1 - sum(level(i) for i in free) / sum(tops.values())
            bar = n["gap_early"] if done < 0.33 else n["gap_middle"] if done < 0.67 else n["gap_late"]
            committed = (np.mean(gaps) if gaps else 1e3) >= bar and bar < np.inf
            for i in left if committed else []:
                new[i] = top(law[i] if commit == "stages" else tree.law(p[i], z[i], 0))
        dropped = [i for i in free if tree.level(new[i]) < level(i)]
        for i in dropped:
            for k in range(tree.level(new[i]) + 1, level(i) + 1):
                path[i][k] = sure[i] if k == level(i) else 1.0

        # what is taken back
        goal = {}
        if plan and plan[1] is not None:
            goal = {i: min(plan[1][i], tops[i]) for i in free}
        elif revise == "backtrack":
            fall, want = {}, {}
            for i in free:
                k = level(i)
                if i in dropped or k == tops[i]:
                    continue
                known = tree.mass(p[i], canvas[i]) if tops[i] == k + 1 else 1.0
                lost = math.prod(path[i][j] for j in range(k + 1, tops[i] + 1)) - tree.mass(p[i], z[i]) / known
                if lost > 0:
                    fall[i] = lost
                    was = math.prod(path[i][j] for j in range(k + 2, tops[i] + 1))
                    steady = tops[i] == k + 1 or tree.mass(p[i], tree.up(z[i], k + 1)) >= was - 1e-9
                    want[i] = 1 if steady else tops[i] - k
            many = 0 if n["mu"] == np.inf else max(1, len(dropped) // n["mu"])
            room = sum(level(i) - tree.level(new[i]) for i in dropped) - 1
            for i in first(fall, many):
                climb = min(want[i], room)
                goal[i], room = level(i) + climb, room - climb
        elif revise in ("running", "planning"):
            units = sum(tops[i] if to == "cluster" else min(tops[i], 1) for i in here)
            whole = sum(tops[i] if to == "cluster" else min(tops[i], 1) for i in free)
            turns = min(max(1, math.ceil(n["steps"] * units / whole)), units)
            rest = (turns - turn - 1) / turns
            many = units * (turns - turn - 1) // turns if schedule == "linear" else int(
                units * math.cos(math.pi / 2 * (1 - rest)) + 1e-4)
            worst = {}
            for i in here:
                own = n["eta"] * math.log(tree.mass(p[i], z[i])) if level(i) == 0 and n["eta"] else 0.0
                worst[i] = -(sure[i] if revise == "running" else math.log(sure[i]) if i in dropped else own)
            if to == "mask":
                goal = {i: tops[i] for i in first({i: w for i, w in worst.items() if tops[i]}, many)}
            else:
                for k in range(1, tree.K + 1):
                    some = first({i: w for i, w in worst.items() if tops[i] >= k}, many)
                    goal, many = goal | dict.fromkeys(some, k), many - len(some)
        for i in goal if not committed else []:
            if goal[i] > tree.level(new[i]):
                new[i] = canvas[i] if goal[i] == tops[i] else tree.up(new[i], goal[i])

        # what is remembered
        stay = [i for i in open_ if i not in dropped]
        some = first({i: how_sure(law[i], "entropy") for i in stay}, n["confident"])
        for i in free:
            past[i] = [law[i] if i in some else None, *past[i]][: depth - 1] if new[i] == before[i] else []
        z, call = new, call + 1
        trail.append(list(z))
