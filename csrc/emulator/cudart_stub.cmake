# _cudart_stub: the CUDA runtime's stand-in. The file's name is ours, its soname is the runtime's:
# that is how a library linked with `-cudart shared` finds it already loaded.
add_library(_cudart_stub SHARED ${CMAKE_CURRENT_LIST_DIR}/cudart_stub.cc)
if(COMMAND qlk_shared_library)
  qlk_shared_library(_cudart_stub)
endif()
set_target_properties(_cudart_stub PROPERTIES PREFIX "" NO_SONAME ON)
target_link_options(_cudart_stub PRIVATE
  LINKER:-soname,libcudart.so.13
  LINKER:--version-script=${CMAKE_CURRENT_LIST_DIR}/cudart_stub.map)
set_target_properties(_cudart_stub PROPERTIES LINK_DEPENDS ${CMAKE_CURRENT_LIST_DIR}/cudart_stub.map)
