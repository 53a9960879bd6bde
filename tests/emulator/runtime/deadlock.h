// Who waits where, when nobody can go on.
#pragma once
#include <string>

namespace emu {

std::string describe_deadlock();

}  // namespace emu
