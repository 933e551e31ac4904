# Compile through ccache where it is installed: a wiped build directory is then cheap to fill again.
find_program(LOUVER_CCACHE ccache)
mark_as_advanced(LOUVER_CCACHE)
if(LOUVER_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  # hash_dir and base_dir let checkouts in different folders share their objects.
  set(_launcher "${CMAKE_COMMAND}" -E env "CCACHE_BASEDIR=${CMAKE_BINARY_DIR}" CCACHE_NOHASHDIR=1 "${LOUVER_CCACHE}")
  set(CMAKE_C_COMPILER_LAUNCHER ${_launcher})
  set(CMAKE_CXX_COMPILER_LAUNCHER ${_launcher})
endif()
