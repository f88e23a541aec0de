"""The method once more, in float64 NumPy loops that share no code with clustax."""

import math

import numpy as np


def softmax(logits):
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def clustered_weights(
    query, key, bias, assignment, *, num_clusters, topk, merge, num_subclusters, scale
):
    """The matrix of (improved) clustered attention (T, S) of one head, for its valid keys."""
    weights = np.zeros((len(query), len(key)))
    for cluster in range(num_clusters):
        members = np.flatnonzero(assignment == cluster)
        if len(members) == 0:
            continue
        run = np.arange(len(members)) * num_subclusters // len(members)
        runs = [np.flatnonzero(run == r) for r in range(num_subclusters) if (run == r).any()]
        centroids = {
            run[members_of_run[0]]: scale * query[members[members_of_run]].mean(axis=0) @ key.T
            + bias
            for members_of_run in runs
        }
        shares = {r: np.mean(run == r) for r in centroids}
        ranks = sum(shares[r] * softmax(centroids[r]) for r in centroids)
        ranks = centroids[0] if num_subclusters == 1 else ranks
        order = np.argsort(-ranks, kind="stable")  # ties go to the lowest index
        top, tail = order[:topk], order[topk:]
        own = scale * query[members] @ key.T + bias
        at_centroid = np.stack([centroids[r] for r in run])
        if merge == "lse":
            own[:, tail] = at_centroid[:, tail]
            mass = softmax(own)[:, top].sum(axis=1)
        else:
            mass = softmax(at_centroid)[:, top].sum(axis=1)
        if len(top):
            weights[np.ix_(members, top)] = mass[:, None] * softmax(own[:, top])
        if len(tail):
            of_tail = sum(shares[r] * softmax(centroids[r][tail]) for r in centroids)
            weights[np.ix_(members, tail)] = (1 - mass)[:, None] * of_tail
    return weights


def attend(inputs, clusters=None, topk=0, merge="mass", num_subclusters=1, *, scale=None):
    """``clustax.attend``, or exact attention where ``clusters`` is None."""
    query, key, value = (np.asarray(x, np.float64) for x in inputs[:3])
    *batch, length, num_heads, head_dim = query.shape
    num_keys, num_key_heads, value_dim = value.shape[-3:]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale

    def of_heads(x, default):
        x = default if x is None else x
        return np.broadcast_to(np.asarray(x), (*batch, num_heads, 1, num_keys))[..., 0, :]

    bias = of_heads(None if inputs.bias is None else inputs.bias.astype(float), 0.0)
    mask = of_heads(inputs.mask, True)
    out = np.zeros((*batch, length, num_heads, value_dim))
    for entry in np.ndindex(*batch):
        num_valid = length if inputs.query_seq_lengths is None else inputs.query_seq_lengths[entry]
        key_length = num_keys
        if inputs.key_value_seq_lengths is not None:
            key_length = inputs.key_value_seq_lengths[entry]
        for head in range(num_heads):
            keys = (
                mask[entry][head]
                & (bias[entry][head] > -np.inf)
                & (np.arange(num_keys) < key_length)
            )
            if not keys.any():
                continue
            key_head = head * num_key_heads // num_heads
            query_ = query[entry][:num_valid, head]
            key_, value_ = (x[entry][keys, key_head] for x in (key, value))
            bias_ = bias[entry][head][keys]
            if clusters is None:
                weights = softmax(scale * query_ @ key_.T + bias_)
            else:
                weights = clustered_weights(
                    query_,
                    key_,
                    bias_,
                    np.asarray(clusters.assignment)[entry][head][:num_valid],
                    num_clusters=clusters.counts.shape[-1],
                    topk=topk,
                    merge=merge,
                    num_subclusters=num_subclusters,
                    scale=scale,
                )
            out[entry][:num_valid, head] = weights @ value_
    return out


def unpack(codes, num_bits):
    """The bits of packed codes, bit b from bit b % 32 of word b // 32."""
    codes = np.asarray(codes)
    return np.stack(
        [codes[..., b // 32] >> np.uint32(b % 32) & 1 for b in range(num_bits)], axis=-1
    )


def hash_codes(query, planes):
    """The codes (T, W) of the queries of one head (T, H), one bit at a time."""
    num_bits = len(planes)
    codes = np.zeros((len(query), math.ceil(num_bits / 32)), np.uint32)
    for position in range(len(query)):
        for b in range(num_bits):
            if query[position] @ planes[b, :-1] > planes[b, -1]:
                codes[position, b // 32] |= np.uint32(1) << np.uint32(b % 32)
    return codes


def kmeans(points, start, num_valid, *, num_iterations, majority):
    """Lloyd's algorithm on the valid points of one head; ``majority`` rounds centroids to bits."""
    points = np.asarray(points, np.float64)
    centroids = points[start]
    for iteration in range(num_iterations):
        distances = ((points[:, None] - centroids) ** 2).sum(axis=-1)
        assignment = np.where(
            np.arange(len(points)) < num_valid, distances.argmin(axis=1), len(start)
        )
        if iteration == num_iterations - 1:
            break
        from_own = np.where(np.arange(len(points)) < num_valid, distances.min(axis=1), -1.0)
        for cluster in range(len(start)):
            members = points[assignment == cluster]
            if len(members):
                mean = members.mean(axis=0)
                centroids[cluster] = mean > 0.5 if majority else mean
            elif cluster < num_valid:  # starts anew at the farthest of each C-th valid point
                every = np.arange(cluster, num_valid, len(start))
                centroids[cluster] = points[every[from_own[every].argmax()]]
    return assignment


def inertia(points, assignment, num_clusters, majority):
    """The sum of squared distances to the centroids; for bits, the number of bits that differ."""
    total = 0.0
    for cluster in range(num_clusters):
        members = np.asarray(points, np.float64)[np.asarray(assignment) == cluster]
        if len(members):
            mean = members.mean(axis=0)
            total += ((members - (mean > 0.5 if majority else mean)) ** 2).sum()
    return total
