#pragma once

namespace emu {

// At the start of a launch: what earlier ones left at atomics is older than all it does.
void forget_messages();

}  // namespace emu
