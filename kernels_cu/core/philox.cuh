// Philox4x32-7 (Salmon et al., SC 2011): four words of random bits from a counter and a key, as cuflash/philox.py.
#pragma once

struct PhiloxKey {
  unsigned lo, hi;
};

__device__ __forceinline__ void philox4x32(unsigned (&words)[4], unsigned c0, unsigned c1, unsigned c2, unsigned c3,
                                           PhiloxKey key) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const unsigned long long product0 = 0xD2511F53ull * c0;
    const unsigned long long product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ key.lo;
    c1 = static_cast<unsigned>(product1);
    c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ key.hi;
    c3 = static_cast<unsigned>(product0);
    key.lo += 0x9E3779B9u;
    key.hi += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}
