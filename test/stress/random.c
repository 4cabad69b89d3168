// SPDX-License-Identifier: Apache-2.0
/* Random numbers that a seed repeats on every machine. */
#include "stress.h"

static uint64_t splitmix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
	x = (x ^ x >> 27) * 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

void rng_seed(struct rng *rng, uint64_t a, uint64_t b, uint64_t c)
{
	rng->state = splitmix(splitmix(splitmix(a) ^ b) ^ c) | 1;
}

uint64_t rng_next(struct rng *rng)
{
	uint64_t x = rng->state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	rng->state = x;
	return x * 0x2545f4914f6cdd1dull;
}

uint64_t rng_below(struct rng *rng, uint64_t n)
{
	return (rng_next(rng) >> 16) % n;
}

bool rng_chance(struct rng *rng, unsigned int percent)
{
	return rng_below(rng, 100) < percent;
}
