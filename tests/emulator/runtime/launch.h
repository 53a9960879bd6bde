// One kernel launch: starts blocks as others finish, a few at a time.
#pragma once
#include <stdint.h>

#include <vector>

namespace emu {

struct Block;

std::vector<const Block*> resident_blocks();

// Serial number of the launch's first block; smaller ones belong to launches that are over.
uint32_t first_serial_of_launch();

}  // namespace emu
