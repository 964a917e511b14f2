"""Brute force on tiny vocabularies, in numpy float64 alone, written from docs/theory.md in the plainest way.

Nothing here is shared with the library: one dense rate matrix over all symbols (words, clusters, mask), its
matrix exponential, Bayes' rule on dense tables, and enumeration of every sequence. The rate of the NELBO is
derived from the Kullback-Leibler divergence of path measures (true against modelled reverse jumps), not from
the formulas of docs/theory.md section 3, which are written out apart (`Toy.cost_by_formula`) so that the two
can be compared.

Symbols are numbered words, level 1, ..., mask. Shapes: V words, N symbols, S positions, Z = N^S sequences of
symbols.
"""

import itertools
import math

import numpy as np

FORCES = ("none", "within", "between", "cavity")


def expm(matrix, tau):
    """exp(tau R) of a rate matrix R; no term is negative, so entries of 1e-40 are right to 1e-13 as well."""
    top = max(-np.diag(matrix).min(), 1e-300)
    a = np.eye(len(matrix)) + matrix / top
    x = top * tau
    squarings = max(0, math.ceil(math.log2(x))) if x > 0 else 0
    y = x / 2**squarings
    term, total = np.eye(len(matrix)), np.eye(len(matrix))
    for m in range(1, 40):
        term = term @ a * (y / m)
        total = total + term
    total = total * math.exp(-y)
    for _ in range(squarings):
        total = total @ total
    return total


def level_generator(rates):
    """The (K+1) x (K+1) bidiagonal generator of the level chain."""
    k = len(rates)
    g = np.zeros((k + 1, k + 1))
    for level, rate in enumerate(rates):
        g[level, level] = -rate
        g[level, level + 1] = rate
    return g


def level_beta(rates, tau):
    """[K+1] law of the level at tau."""
    return expm(level_generator(rates), tau)[0]


def level_weight(rates, tau):
    """[K] w_1 .. w_K."""
    beta = level_beta(rates, tau)
    return np.array([rates[k] * beta[k] / beta[k + 1] for k in range(len(rates))])


def level_posterior(rates, tau_s, tau_t):
    """[K+1, K+1]: row the level at tau_t, column the level at tau_s (Bayes; tau_t > 0)."""
    before, step, after = (expm(level_generator(rates), t) for t in (tau_s, tau_t - tau_s, tau_t))
    k = len(rates)
    return np.array([[before[0, j] * step[j, i] / after[0, i] for j in range(k + 1)] for i in range(k + 1)])


def quadrature(rates, nodes=16):
    """Gauss-Legendre nodes and weights over noise time [0, 50 / slowest rate], in panels."""
    edges = np.array([0, 0.25, 1, 2.5, 5, 9, 15, 25, 50]) / min(rates)
    x, w = np.polynomial.legendre.leggauss(nodes)
    tau = [(a + b) / 2 + (b - a) / 2 * x for a, b in zip(edges[:-1], edges[1:], strict=True)]
    weight = [(b - a) / 2 * w for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return np.concatenate(tau), np.concatenate(weight)


def random_joint(vocab_size, length, seed=0, concentration=0.3):
    """A positive joint distribution of `length` dependent words, [V] * S."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(vocab_size**length, concentration)) + 1e-4
    return (p / p.sum()).reshape((vocab_size,) * length)


def entropy(p):
    """Nats; 0 log 0 = 0."""
    p = np.asarray(p)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


class Toy:
    """A hierarchy, its forward process and everything that can be enumerated about it.

    Args:
      parents: maps fine to coarse as `Hierarchy.from_parents` takes them; the map to the mask is added here.
      rates: r_1 .. r_K, K = len(parents) + 1.
      xi: probability that the first crossing goes to the word's own cluster.
      vocab_size: V where parents is empty.
      soft: [V, n_1], where a word goes when it first crosses, in place of xi's law.
    """

    def __init__(self, parents, rates, xi=1.0, vocab_size=None, soft=None):
        self.soft = soft
        self.given = [np.asarray(p) for p in parents]
        sizes = [len(p) for p in self.given] or [vocab_size]
        if self.given:
            sizes.append(int(self.given[-1].max()) + 1)
        self.parents = [*self.given, np.zeros(sizes[-1], int)]
        self.sizes = [*sizes, 1]
        self.rates, self.K, self.V, self.N = list(rates), len(rates), sizes[0], sum(self.sizes)
        assert self.K == len(self.parents)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])[:-1]
        self.level = np.concatenate([np.full(n, k) for k, n in enumerate(self.sizes)])
        self.node = np.concatenate([np.arange(n) for n in self.sizes])
        self.xi, self.mask = xi, self.N - 1
        self.anc = [np.arange(self.V)]
        for p in self.parents:
            self.anc.append(p[self.anc[-1]])
        n1 = self.sizes[1]
        self.d = (1 - xi) / (n1 - 1) if n1 > 1 else 0.0

    # ---- forward process -------------------------------------------------------------------------

    def kernel(self):
        """[V, n_1] where a word goes when it first crosses."""
        if self.soft is not None:
            return self.soft
        k = np.zeros((self.V, self.sizes[1]))
        for x in range(self.V):
            for c in range(self.sizes[1]):
                if self.sizes[1] == 1:
                    k[x, c] = 1.0
                else:
                    k[x, c] = self.xi if c == self.anc[1][x] else (1 - self.xi) / (self.sizes[1] - 1)
        return k

    def rate_matrix(self):
        """[N, N] rates of jumps between symbols (row: from)."""
        r = np.zeros((self.N, self.N))
        kernel = self.kernel()
        for x in range(self.V):
            r[x, self.offsets[1] : self.offsets[1] + self.sizes[1]] = self.rates[0] * kernel[x]
        for level in range(1, self.K):
            for u in range(self.sizes[level]):
                v = self.parents[level][u]
                r[self.offsets[level] + u, self.offsets[level + 1] + v] = self.rates[level]
        return r - np.diag(r.sum(1))

    def q(self, tau):
        """[V, N] law of the symbol at tau of a token whose word is the row."""
        return expm(self.rate_matrix(), tau)[: self.V]

    def shown(self, level):
        """M_k, [V, n_k]: law of the node of a token of that level, the kernel pushed up the parent maps."""
        m = np.eye(self.V) if level == 0 else self.kernel()
        for k in range(1, level):
            up = np.zeros((self.sizes[k], self.sizes[k + 1]))
            up[np.arange(self.sizes[k]), self.parents[k]] = 1
            m = m @ up
        return m

    def level1_count(self, level):
        """N_k, [n_k]: level-1 nodes under each node of a level >= 1."""
        count = np.ones(self.sizes[1], int)
        for k in range(1, level):
            up = np.zeros(self.sizes[k + 1], int)
            for u, v in enumerate(self.parents[k]):
                up[v] += count[u]
            count = up
        return count

    def _is_under(self, j, u, k, v):
        while j < k:
            u, j = self.parents[j][u], j + 1
        return u == v

    def pi(self, symbol, j):
        """[V, n_j] law of the level-j node under a symbol given the word, by Bayes on dense tables.

        Where the word cannot show the symbol (xi = 1): the limit xi -> 1. Any xi < 1 gives it, as it does not
        depend on xi.
        """
        if j == 0:
            return np.eye(self.V)
        k, v = self.level[symbol], self.node[symbol]
        out = np.zeros((self.V, self.sizes[j]))
        for x in range(self.V):
            toy = self if self.shown(k)[x, v] > 0 else self._limit()
            for u in range(self.sizes[j]):
                out[x, u] = toy.shown(j)[x, u] * self._is_under(j, u, k, v) / toy.shown(k)[x, v]
        return out

    def _limit(self):
        return Toy(self.given, self.rates, 1 / self.sizes[1] + 0.7 * (1 - 1 / self.sizes[1]), self.V)

    # ---- networks: tables [Z, S, V], a distribution over words at each position of each z --------

    def sequences(self, length):
        """[Z, S] every sequence of symbols, first position slowest."""
        return np.array(list(itertools.product(range(self.N), repeat=length)))

    def words(self, length):
        """[V^S, S] every sequence of words."""
        return np.array(list(itertools.product(range(self.V), repeat=length)))

    def random_network(self, length, seed=0):
        """A network that knows nothing."""
        rng = np.random.default_rng(seed)
        return rng.dirichlet(np.ones(self.V), (self.N**length, length)) * 0.99 + 0.01 / self.V

    def bayes(self, joint, cavity=False, tau=0.7):
        """The Bayes-optimal network [Z, S, V]: p(x_i | z), or p(x_i | z at the other positions) as a cavity.

        It is computed at the given tau and must not depend on it (fact 3).
        """
        length, q = joint.ndim, self.q(tau)
        out = np.zeros((self.N**length, length, self.V))
        for row, z in enumerate(self.sequences(length)):
            for i in range(length):
                table = joint
                for j in range(length):
                    if not (cavity and j == i):
                        shape = [1] * length
                        shape[j] = self.V
                        table = table * q[:, z[j]].reshape(shape)
                p = table.sum(axis=tuple(j for j in range(length) if j != i))
                out[row, i] = p / p.sum()
        return out

    def force(self, network, kind):
        """The p a sampler or a loss uses for a network's output (section 3, "Force transition")."""
        length = network.shape[1]
        out = network.copy()
        for row, z in enumerate(self.sequences(length)):
            for i in range(length):
                out[row, i] = self.force_one(network[row, i], z[i], kind)
        return out

    def force_one(self, p, symbol, kind):
        """The same for one distribution [V] at one symbol."""
        k, v = self.level[symbol], self.node[symbol]
        if kind not in FORCES:
            raise ValueError(kind)
        if kind == "none" or not 1 <= k < self.K:
            return p
        under = self.anc[k] == v
        if kind == "within":
            p = np.where(under, p, 0)
        elif kind == "cavity":
            p = p * self.shown(k)[:, v]
        else:
            inside = self.d * self.level1_count(k)[v] + self.xi - self.d
            p_in, p_out = np.where(under, p, 0), np.where(under, 0, p)
            p_out = p_out * (1 - inside) / p_out.sum() if inside < 1 else 0 * p_out
            return p_in * inside / p_in.sum() + p_out
        return p / p.sum()

    # ---- NELBO -----------------------------------------------------------------------------------

    def reverse_rates(self, tau):
        """[V, N, N] rate of the reverse jump v -> u at tau, of a token whose word is x: indexed [x, v, u].

        R(u -> v) q(u|x) / q(v|x); where the word cannot show v, the limit xi -> 1 (see `pi`).
        """
        out = np.zeros((self.V, self.N, self.N))
        done = np.zeros((self.V, self.N), bool)
        for toy in (self, self._limit() if self.sizes[1] > 1 else self):
            rates = toy.rate_matrix()
            np.fill_diagonal(rates, 0)
            q = toy.q(tau)
            for x in range(self.V):
                for v in range(self.N):
                    if not done[x, v] and q[x, v] > 0:
                        out[x, v] = rates[:, v] * q[x] / q[x, v]
                        done[x, v] = True
        return out

    def rate(self, p, x, symbol, tau, reverse=None):
        """NELBO rate of one token: the divergence of true from modelled reverse jumps, nats per unit tau."""
        reverse = self.reverse_rates(tau) if reverse is None else reverse
        if self.level[symbol] == 0:
            return 0.0
        true, model = reverse[x, symbol], p @ reverse[:, symbol]
        with np.errstate(divide="ignore", invalid="ignore"):
            return float((np.where(true > 0, true * np.log(true / model), 0.0) - true + model).sum())

    def cost_by_formula(self, p, x, symbol):
        """C of docs/theory.md section 3, letter by letter."""
        k, v = self.level[symbol], self.node[symbol]
        if k == 0:
            return 0.0
        if k == 1:
            return -math.log(p[x])
        n_u, n_v = self.level1_count(k - 1), self.level1_count(k)[v]
        under_v = self.anc[k] == v
        total = 0.0
        for u in range(self.sizes[k - 1]):
            if self.parents[k - 1][u] != v:
                continue
            p_u, p_v, rest = p[self.anc[k - 1] == u].sum(), p[under_v].sum(), p[~under_v].sum()  # rest = 1 - p_v
            inside = (self.d * n_u[u] * p_v + (self.xi - self.d) * p_u) / (self.d * n_v + self.xi - self.d)
            model = inside + rest * n_u[u] / n_v
            if under_v[x]:
                own = self.anc[k - 1][x] == u
                true = (self.d * n_u[u] + (self.xi - self.d) * own) / (self.d * n_v + self.xi - self.d)
            else:
                true = n_u[u] / n_v
            if true > 0:
                total += true * math.log(true / model)
        return total

    def rates_table(self, network, tau):
        """[Z, S, V] NELBO rate at each position of each z for each word that could be the clean one."""
        reverse = self.reverse_rates(tau)  # [x, v, u]
        length = network.shape[1]
        z = self.sequences(length)
        model = np.einsum("zsx,xzsu->zsu", network, reverse[:, z])
        true = np.moveaxis(reverse[:, z], 0, 2)  # [Z, S, V, N]
        with np.errstate(divide="ignore", invalid="ignore"):
            log = np.where(true > 0, true * np.log(true / model[:, :, None]), 0.0)
        return (log - true + model[:, :, None]).sum(-1)

    def occupancy(self, tau, length):
        """[V^S, Z] law of the whole z for every sequence of words."""
        q, z, words = self.q(tau), self.sequences(length), self.words(length)
        out = np.ones((len(words), len(z)))
        for i in range(length):
            out = out * q[words[:, i]][:, z[:, i]]
        return out

    def nelbo(self, network, rates_table=None, nodes=16):
        """[V] * S NELBO of every sequence of words in nats: quadrature over noise time, enumeration of z.

        `rates_table(network, tau)` -> [Z, S, V] lets a test put the library's rates in place of these.
        """
        length = network.shape[1]
        rates_table = rates_table or self.rates_table
        words = self.words(length)
        total = np.zeros(len(words))
        for tau, weight in zip(*quadrature(self.rates, nodes), strict=True):
            table = np.asarray(rates_table(network, tau), float)
            law = self.occupancy(tau, length)
            for i in range(length):
                cost = np.where(law > 0, table[:, i, words[:, i]].T, 0)  # what never shows may cost infinity
                total += weight * (law * cost).sum(1)
        return total.reshape((self.V,) * length)

    # ---- reverse process -------------------------------------------------------------------------

    def step_table(self, tau_s, tau_t):
        """[V, N, N] law of the symbol at tau_s (last axis) given the word and the symbol at tau_t, by Bayes.

        tau_t may be inf: then only the mask's row means anything. Where the word cannot show it, the limit.
        """
        out, done = np.zeros((self.V, self.N, self.N)), np.zeros((self.V, self.N), bool)
        if math.isinf(tau_t):
            out[:, self.mask] = self.q(tau_s)
            return out
        for toy in (self, self._limit() if self.sizes[1] > 1 else self):
            q_s, q_t, between = toy.q(tau_s), toy.q(tau_t), expm(toy.rate_matrix(), tau_t - tau_s)
            for x in range(self.V):
                for v in range(self.N):
                    if not done[x, v] and q_t[x, v] > 0:
                        out[x, v] = q_s[x] * between[:, v] / q_t[x, v]
                        done[x, v] = True
        return out

    def step(self, p, symbol, tau_s, tau_t):
        """[N] law of the symbol at tau_s given the one at tau_t, for words p [V]."""
        return p @ self.step_table(tau_s, tau_t)[:, symbol]

    def p_grid(self, network, taus):
        """[V] * S what ancestral sampling writes on a grid of falling noise times (inf first, 0 last)."""
        length = network.shape[1]
        z = self.sequences(length)
        law = np.zeros(len(z))
        law[-1] = 1
        for tau_t, tau_s in zip(taus[:-1], taus[1:], strict=True):
            table = self.step_table(tau_s, tau_t)
            after = np.zeros((self.N,) * length)
            for row in np.flatnonzero(law):
                joint = np.array(law[row])
                for i in range(length):
                    v = z[row, i]
                    one = np.eye(self.N)[v] if v < self.V else network[row, i] @ table[:, v]
                    joint = np.multiply.outer(joint, one)
                after += joint
            law = after.ravel()
        return law.reshape((self.N,) * length)[(slice(0, self.V),) * length]

    def one_drop(self, p, symbol):
        """[N] law of the symbol one level below (a token at level k goes to level k - 1)."""
        j = self.level[symbol] - 1
        out = np.zeros(self.N)
        out[self.offsets[j] : self.offsets[j] + self.sizes[j]] = p @ self.pi(symbol, j)
        return out

    def p_model(self, network):
        """[V] * S what one drop of one level a call writes, by all orders of the crossings."""
        length = network.shape[1]
        drops = np.zeros((self.N**length, length, self.N))
        for row, z in enumerate(self.sequences(length)):
            for i in range(length):
                if self.level[z[i]] > 0:
                    drops[row, i] = self.one_drop(network[row, i], z[i])
        drops = drops.reshape((self.N,) * length + (length, self.N))
        orders = set(itertools.permutations([i for i in range(length) for _ in range(self.K)]))
        total, chances = np.zeros((self.V,) * length), 0.0
        for order in orders:  # forward in time: which token crosses next
            levels, chance = [0] * length, 1.0
            for i in order:
                clocks = [self.rates[level] if level < self.K else 0.0 for level in levels]
                chance *= clocks[i] / sum(clocks)
                levels[i] += 1
            chances += chance
            law = np.zeros((self.N,) * length)
            law[(self.mask,) * length] = 1
            for i in reversed(order):
                flow = law[..., None] * drops[..., i, :]  # [z..., new symbol of i]
                law = np.moveaxis(flow.sum(axis=i), -1, i)
            total += chance * law[(slice(0, self.V),) * length]
        assert abs(chances - 1) < 1e-12
        return total


def total_variation(counts, p):
    """Distance of an empirical law from p, and its mean and standard deviation if the sample were from p.

    |c - np| of each cell is treated as that of a normal variable, sqrt(2/pi) sd; the deviation ignores the
    (negative) covariances, so it is on the safe side.
    """
    counts, p = np.asarray(counts, float).ravel(), np.asarray(p, float).ravel()
    n = counts.sum()
    sd = np.sqrt(p * (1 - p) / n)
    floor = 0.5 * math.sqrt(2 / math.pi) * sd.sum()
    spread = 0.5 * math.sqrt((1 - 2 / math.pi) * (sd**2).sum())
    return 0.5 * np.abs(counts / n - p).sum(), floor, spread


class Gidd:
    """GIDD over words 0..V-1 and the mask V, written out (arXiv 2503.04482 section 3): what it mixes in and rates."""

    def __init__(self, vocab_size, p_uniform):
        self.V, self.p_u = vocab_size, p_uniform

    def alpha_mix(self, t):
        """alpha_t and beta_t pi_t [V+1]."""
        b = 2 * self.p_u / (1 - self.p_u)
        c = b * math.sqrt(t * (1 - t))
        mix = np.full(self.V + 1, c / self.V)
        mix[-1] = t
        return (1 - t) / (1 + c), mix / (1 + c)

    def marginal(self, t):
        """q_t(z | x), [V, V+1]."""
        alpha, mix = self.alpha_mix(t)
        return alpha * np.eye(self.V, self.V + 1) + mix

    def transition(self, s, t):
        """q(z_t | z_s), [V+1, V+1]: what is kept, and what is mixed in on the way."""
        (alpha_s, mix_s), (alpha_t, mix_t) = self.alpha_mix(s), self.alpha_mix(t)
        kept = alpha_t / alpha_s
        return kept * np.eye(self.V + 1) + (mix_t - kept * mix_s)

    def posterior(self, p, s, t):
        """q(z_s | z_t) for x ~ p [V]: [V+1 (z_t), V+1 (z_s)], by Bayes' rule."""
        joint = (p @ self.marginal(s))[:, None] * self.transition(s, t)
        return (joint / joint.sum(0)).T

    def nelbo_rate(self, p, x, z, t, step=1e-6):
        """Nats per unit of t of a token x that shows z: the divergence of two jump processes, by their rates."""
        rate = (self.transition(t - step / 2, t + step / 2) - np.eye(self.V + 1)) / step
        true, model = self.marginal(t)[x], p @ self.marginal(t)
        total = 0.0
        for other in range(self.V + 1):
            if other != z:
                r, r_model = (rate[other, z] * q[other] / q[z] for q in (true, model))
                total += r_model - r + (r * math.log(r / r_model) if r > 0 else 0.0)
        return total
